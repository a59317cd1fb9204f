"""The two products of decode attention with packed groups, wherever they lie: codes stay codes.

A group's key scales multiply the query, once for each group; a token's value scales multiply the weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, DTypeLike, UInt8

from pallas_kernels.codes import widen
from pallas_kernels.decode_attention.products import TOP, dot, integer_dot, joined, two_bytes

NIBBLES = np.int32(0x0F0F0F0F)


def unpacked(codes: UInt8[Array, "bytes H"], group: int, dtype: DTypeLike) -> list[Array]:
    """Return the codes of each group `[group, H]`, the tokens in order, inside a kernel."""
    words, half = pltpu.bitcast(codes, jnp.int32), group // 2  # of four rows
    low, high = (
        widen(pltpu.bitcast(x & NIBBLES, jnp.int8), dtype) for x in (words, jax.lax.shift_right_logical(words, 4))
    )
    return [jnp.concatenate([low[m : m + half], high[m : m + half]]) for m in range(0, codes.shape[0], half)]


class PackedInside:
    """A block of packed groups in VMEM, of a `store` with `heads`, `slots`, `group`, `runs`, `head_dim`, `integer`."""

    store: Any

    def codes(self, i, h, buffer) -> Array:
        """Return the bytes `[slots / 2, H]` of the keys (i = 0) or values (i = 1) of head h."""
        raise NotImplementedError

    def key_grid(self, h, buffer) -> tuple[Array, Array]:
        """Return the scales and the offsets of a head's keys, `[groups, H]` float32."""
        raise NotImplementedError

    def value_grid(self, h, buffer) -> tuple[Array, Array]:
        """Return the scales and the offsets of a head's values, `[runs, slots]` float32."""
        raise NotImplementedError

    def _groups(self, i, h, buffer, dtype):
        return unpacked(self.codes(i, h, buffer), self.store.group, dtype)

    def begin(self, queries) -> None:
        """Nothing to prepare: a query is scaled for each group."""

    def scores(self, queries, buffer):
        """Return the scores of the block in a buffer, `[heads * R, slots]`."""
        store, dtype = self.store, queries[0].dtype
        each, groups = range(store.heads), range(store.slots // store.group)
        codes = [self._groups(0, h, buffer, jnp.int8 if store.integer else dtype) for h in each]
        scales, offsets = zip(*(self.key_grid(h, buffer) for h in each), strict=True)
        wide = [q.astype(jnp.float32) for q in queries]
        scaled = [[wide[h] * scales[h][m : m + 1] for m in groups] for h in each]
        last = ((1,), (1,))
        if store.integer:
            steps = [[jnp.abs(x).max(axis=1, keepdims=True) / TOP for x in own] for own in scaled]
            parts = [
                [two_bytes(x / jnp.where(s == 0, 1, s)) for x, s in zip(*own, strict=True)]
                for own in zip(scaled, steps, strict=True)
            ]
            products = [
                [joined(integer_dot(parts[h][m], codes[h][m], last)) * steps[h][m] for m in groups] for h in each
            ]
        else:
            products = [[dot(scaled[h][m].astype(dtype), codes[h][m], last) for m in groups] for h in each]
        shifts = [[(wide[h] * offsets[h][m : m + 1]).sum(axis=1, keepdims=True) for m in groups] for h in each]
        return jnp.concatenate([jnp.concatenate([products[h][m] + shifts[h][m] for m in groups], axis=1) for h in each])

    def mixed(self, weights, buffer, dtype, alive):
        """Return its values under the weights, `[heads * R, H]`."""
        store = self.store
        runs, R = store.runs, weights.shape[0] // store.heads
        codes = [self._groups(1, h, buffer, jnp.int8 if store.integer else dtype) for h in range(store.heads)]
        channel, width = jax.lax.broadcasted_iota(jnp.int32, (R, store.head_dim), 1), store.head_dim // runs

        def grid(h):
            found = self.value_grid(h, buffer)
            return found if alive is None else [jnp.where(alive[1], x, 0) for x in found]

        each = range(store.heads)
        own = [weights[h * R : (h + 1) * R] for h in each]
        factors, shifts = zip(*(grid(h) for h in each), strict=True)
        scaled = [[own[h] * factors[h][r : r + 1] for r in range(runs)] for h in each]
        codes = [jnp.concatenate(x) for x in codes]
        first = ((1,), (0,))
        if store.integer:
            steps = [
                [jnp.abs(factors[h][r : r + 1]).max(axis=1, keepdims=True) / TOP for r in range(runs)] for h in each
            ]
            parts = [
                jnp.concatenate([two_bytes(x / jnp.where(s == 0, 1, s)) for x, s in zip(*own, strict=True)])
                for own in zip(scaled, steps, strict=True)
            ]
            bare = [integer_dot(parts[h], codes[h], first) for h in each]
            products = [[joined(bare[h][2 * r * R :][: 2 * R]) * steps[h][r] for r in range(runs)] for h in each]
        else:
            bare = [dot(jnp.concatenate(scaled[h]).astype(dtype), codes[h], first) for h in each]
            products = [[bare[h][r * R : (r + 1) * R] for r in range(runs)] for h in each]
        found = []
        for h in each:
            total = jnp.zeros((R, store.head_dim), jnp.float32)
            for r in range(runs):
                shift = (own[h] * shifts[h][r : r + 1]).sum(axis=1, keepdims=True)
                total = jnp.where(channel >= r * width, products[h][r] + shift, total)
            found.append(total)
        return jnp.concatenate(found)

    def write(self, row, first_head, base, buffer, length):
        """Nothing is appended to packed groups here."""

    def wrote(self, row, first_head, base, buffer, length):
        """Nothing was."""
