"""How a cache lies in HBM, for the kernels that read it block by block: what they copy, and what they make of a copy.

A store is made outside the kernel from the arrays. `inside(refs)` gives its view inside: `copies` of a block, and the
two products with one.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.decode_attention import products


class Dense:
    """A cache `[B, K, S, H]`, and where it is quantized its scales `[B, K, S]`; a block is `slots` of `heads` heads."""

    scalars: tuple[Any, ...] = ()
    updated = 0  # arrays that the kernel changes in place

    def __init__(
        self,
        k: Array,
        v: Array,
        k_scale: Float[Array, "B K S"] | None,
        v_scale: Float[Array, "B K S"] | None,
        *,
        slots: int,
        heads: int,
        depth: int,
    ):
        self.arrays = [k, v] if k_scale is None else [k, v, k_scale, v_scale]
        self.specs = [pl.BlockSpec(memory_space=compat.ANY)] * len(self.arrays)
        self.slots, self.heads, self.depth = slots, heads, depth
        self.head_dim = k.shape[3]

    def scratch(self, rows: int, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into, for `rows` query rows of `dtype`."""
        k, v, *scales = self.arrays
        shapes = [compat.VMEM((self.depth, self.heads, self.slots, self.head_dim), x.dtype) for x in (k, v)]
        shapes += [compat.VMEM((self.depth, self.heads, self.slots), x.dtype) for x in scales]
        shapes.append(compat.dma_semaphores(self.depth, len(self.arrays)))
        self.integer = products.integer(k.dtype, dtype, rows)
        return shapes + (products.scratch(self.heads, rows, self.head_dim) if self.integer else [])

    def inside(self, scalars: Sequence[Any], arrays: Sequence[Any], updated: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        del scalars, updated
        return _DenseInside(self, arrays, scratch)


class _DenseInside:
    def __init__(self, store: Dense, arrays: Sequence[Any], scratch: Sequence[Any]):
        count = len(arrays)
        self.store, self.arrays = store, arrays
        self.buffers, self.semaphores, self.prepared = scratch[:count], scratch[count], scratch[count + 1 :] or None

    def copies(self, row, first_head, block, buffer, end) -> list[Any]:
        """Return the copies of a block into a buffer; `end` is the row's length."""
        del end
        heads = pl.ds(pl.multiple_of(first_head, self.store.heads), self.store.heads)
        slots = pl.ds(pl.multiple_of(block * self.store.slots, self.store.slots), self.store.slots)
        return [
            pltpu.make_async_copy(array.at[(row, heads, slots)], to.at[buffer], self.semaphores.at[buffer, i])
            for i, (array, to) in enumerate(zip(self.arrays, self.buffers, strict=True))
        ]

    def begin(self, queries) -> None:
        """Prepare a row's queries, a list of one `[R, H]` a head."""
        if self.prepared:
            products.prepare(queries, *self.prepared)

    def scores(self, queries, buffer):
        """Return the scores of the block in a buffer, `[heads * R, slots]`."""
        each = range(self.store.heads)
        keys = [self.buffers[0][buffer, h] for h in each]
        return products.scores(queries, keys, self._scales(2, buffer), self.prepared)

    def mixed(self, weights, buffer, dtype, alive):
        """Return its values under the weights, `[heads * R, H]`."""
        values = [self.buffers[1][buffer, h] for h in range(self.store.heads)]
        return products.mixed(weights, values, self._scales(3, buffer), dtype, alive, self.prepared is not None)

    def _scales(self, i, buffer):
        if len(self.buffers) == 2:
            return None
        return [self.buffers[i][buffer, h : h + 1] for h in range(self.store.heads)]

    def write(self, row, first_head, base, buffer, length):
        """Put a row's new tokens into its last blocks: a dense cache holds them already."""

    def wrote(self, row, first_head, base, buffer, length):
        """Wait until they are in HBM."""


def alive(base, slots, start, length):
    """Return which slots of a block hold something, as a column and as a line."""
    column = base + jax.lax.broadcasted_iota(jnp.int32, (slots, 1), 0)
    line = base + jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    return tuple((x >= start) & (x < length) for x in (column, line))
