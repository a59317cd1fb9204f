"""Attention over packed groups on TPU: a group's scales multiply the query, a token's the weights; codes stay codes."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import chips, compat, tuning
from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention.products import integer
from pallas_kernels.decode_attention.rows import attend_rows
from pallas_kernels.kivi_attention.products import PackedInside


def kivi_attention(
    q: Float[Array, "B T N H"],
    k_codes: UInt8[Array, "B K S2 H"],
    v_codes: UInt8[Array, "B K S2 H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    length: Int[Known, "B"],
    *,
    scale: float,
    group: int,
    position: Int[Known, "B"],
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: slots a copy, key heads a copy, buffers, splits; by default those tuned for the chip.

    Raises:
        NotImplementedError: groups that do not fill whole tiles of bytes, or slots that no block of groups divides.
        ValueError: blocks that need too much VMEM.
    """
    K, S = k_codes.shape[1], v_scale.shape[2]
    if group % 64:
        raise NotImplementedError(f"group={group}: must be a multiple of 64 tokens, whose bytes fill whole tiles")
    chosen = blocks or tuning.blocks("kivi_attention", chips.current().name, shape_class(q, k_codes, group=group))
    store = Packed(
        [k_codes, v_codes, k_scale, k_offset, v_scale, v_offset],
        group, slots=_block(chosen["slots"], S, group), heads=math.gcd(chosen["heads"], K), depth=chosen["buffers"],
    )  # fmt: skip
    out, lse, _ = attend_rows(
        "kivi_attention", q, store, K, S, length, scale=scale, start=None, position=position, window=window, sinks=0,
        softcap=softcap, tree=None, return_lse=return_lse, splits=chosen["splits"], interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def shape_class(q: Any, k_codes: Any, *_, group: int, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: the cache's shape and the tokens of a group."""
    _, K, half, H = k_codes.shape
    return {"K": K, "S": 2 * half, "H": H, "group": group}


def _block(slots: int, S: int, group: int) -> int:
    """Return the most slots, at most `slots`, whose groups fill whole tiles of their scales; all S in one block."""
    if slots >= S:
        return S
    tile = 16 * group
    for size in range(slots - slots % tile, 0, -tile):
        if S % size == 0:
            return size
    raise NotImplementedError(f"{S} slots: must be a multiple of {tile}, 16 groups, or at most {slots}")


class Packed:
    """Packed groups as a store of `attend_rows`: a block is `slots` of `heads` heads."""

    scalars: tuple[Any, ...] = ()
    updated = 0

    def __init__(self, arrays: Sequence[Array], group: int, *, slots: int, heads: int, depth: int):
        self.arrays = list(arrays)
        self.specs = [pl.BlockSpec(memory_space=compat.ANY)] * len(self.arrays)
        self.group, self.slots, self.heads, self.depth = group, slots, heads, depth
        self.head_dim = arrays[0].shape[3]
        self.runs = arrays[4].shape[1] // arrays[0].shape[1]

    def scratch(self, rows: int, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into."""
        self.integer = integer(jnp.int8, dtype, rows)
        shapes = [(self.heads, self.slots // 2, self.head_dim)] * 2
        shapes += [(self.heads, self.slots // self.group, self.head_dim)] * 2
        shapes += [(self.heads * self.runs, self.slots)] * 2
        buffers = [compat.VMEM((self.depth, *s), x.dtype) for s, x in zip(shapes, self.arrays, strict=True)]
        return [*buffers, compat.dma_semaphores(self.depth, len(buffers))]

    def inside(self, scalars: Sequence[Any], arrays: Sequence[Any], updated: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        del scalars, updated
        return _PackedInside(self, arrays, scratch)


class _PackedInside(PackedInside):
    def __init__(self, store: Packed, arrays: Sequence[Any], scratch: Sequence[Any]):
        self.store, self.arrays = store, arrays
        self.buffers, self.semaphores = scratch[:-1], scratch[-1]
        self.whole = store.slots == store.arrays[4].shape[2]

    def copies(self, row, first_head, block, buffer, end) -> list[Any]:
        """Return the copies of a block into a buffer."""
        del end
        store = self.store

        def part(start, size):
            # All of it begins at 0, which the compiler must know of what fills no tile.
            return pl.ds(0 if self.whole else pl.multiple_of(start * size, size), size)

        heads = pl.ds(pl.multiple_of(first_head, store.heads), store.heads)
        lines = pl.ds(pl.multiple_of(first_head * store.runs, store.heads * store.runs), store.heads * store.runs)
        rows, groups, slots = (part(block, n) for n in (store.slots // 2, store.slots // store.group, store.slots))
        places = [(row, heads, rows)] * 2 + [(row, heads, groups)] * 2 + [(row, lines, slots)] * 2
        return [
            pltpu.make_async_copy(array.at[place], to.at[buffer], self.semaphores.at[buffer, i])
            for i, (array, to, place) in enumerate(zip(self.arrays, self.buffers, places, strict=True))
        ]

    def codes(self, i, h, buffer):
        """Return the bytes of a head."""
        return self.buffers[i][buffer, h]

    def key_grid(self, h, buffer):
        """Return the scales and the offsets of a head's keys."""
        return tuple(self.buffers[i][buffer, h].astype(jnp.float32) for i in (2, 3))

    def value_grid(self, h, buffer):
        """Return the scales and the offsets of a head's values."""
        own = slice(h * self.store.runs, (h + 1) * self.store.runs)
        return tuple(self.buffers[i][buffer, own].astype(jnp.float32) for i in (4, 5))
