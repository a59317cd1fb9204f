"""How a cache lies in HBM, for the kernel that reads blocks of one key head: what it copies, what it multiplies.

A store is made outside the kernel from the arrays. `inside(arrays, scratch)` gives its view inside.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.calls import round_up
from pallas_kernels.codes import widen


class Dense:
    """A cache `[B, K, S, H]`, and where it is quantized its scales `[B, K, S]`; a block is `slots` of one head."""

    def __init__(
        self,
        k: Array,
        v: Array,
        k_scale: Float[Array, "B K S"] | None,
        v_scale: Float[Array, "B K S"] | None,
        *,
        slots: int,
        depth: int,
    ):
        B, K, S, self.head_dim = k.shape
        self.slots, self.depth, self.quantized = slots, depth, k_scale is not None
        padding = round_up(S, slots) - S
        self.arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x for x in (k, v)]
        if self.quantized:
            # One row a key head: a copy of some slots is then whole lanes; float32, of which a row is whole words.
            self.arrays += [
                jnp.pad(x.astype(jnp.float32).reshape(B, K, 1, S), ((0, 0),) * 3 + ((0, padding),))
                for x in (k_scale, v_scale)
            ]

    def scratch(self, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into, for queries of `dtype`."""
        del dtype
        shapes = [compat.VMEM((self.depth, self.slots, self.head_dim), x.dtype) for x in self.arrays[:2]]
        shapes += [compat.VMEM((self.depth, 1, self.slots), x.dtype) for x in self.arrays[2:]]
        return [*shapes, compat.dma_semaphores(self.depth, len(self.arrays))]

    def inside(self, arrays: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        return _DenseInside(self, arrays, scratch)


class _DenseInside:
    def __init__(self, store: Dense, arrays: Sequence[Any], scratch: Sequence[Any]):
        self.store, self.arrays, self.buffers, self.semaphores = store, arrays, scratch[:-1], scratch[-1]

    def copies(self, row, head, block, buffer) -> list[Any]:
        """Return the copies of a block of a key head into a buffer."""
        base = pl.ds(pl.multiple_of(block * self.store.slots, self.store.slots), self.store.slots)
        places = [(row, head, base), (row, head, base), (row, head, 0, base), (row, head, 0, base)]
        return [
            pltpu.make_async_copy(
                array.at[place], to.at[(buffer, 0) if i > 1 else buffer], self.semaphores.at[buffer, i]
            )
            for i, (array, to, place) in enumerate(zip(self.arrays, self.buffers, places, strict=False))
        ]

    def ready(self, buffer, base, length) -> None:
        """Make a block that has come ready to be read: floats beyond the row's length become 0."""
        if not self.store.quantized:

            @pl.when(base + self.store.slots > length)
            def _():
                self.buffers[1][buffer] = self._live(self.buffers[1][buffer], base, length)

    def read(self, buffer, dtype, masked, base, length):
        """Return a block's keys and values `[slots, H]`, and scales `[1, slots]` of each or None.

        Where `masked`, it may reach beyond the row's length.
        """
        keys, values = (widen(x[buffer], dtype) for x in self.buffers[:2])
        if not self.store.quantized:
            return keys, values, None, None
        k_scale, v_scale = (x[buffer] for x in self.buffers[2:])
        if masked:
            values = self._live(values, base, length)
            slot = base + jax.lax.broadcasted_iota(jnp.int32, (1, self.store.slots), 1)
            v_scale = jnp.where(slot < length, v_scale, 0)
        return keys, values, k_scale, v_scale

    def _live(self, values, base, length):
        """Return values with zeros for slots beyond the row's length: a weight of 0 does not undo a NaN."""
        slot = base + jax.lax.broadcasted_iota(jnp.int32, (self.store.slots, 1), 0)
        return jnp.where(slot < length, values.astype(jnp.float32), 0).astype(values.dtype)
