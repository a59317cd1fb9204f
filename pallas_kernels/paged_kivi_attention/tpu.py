"""Attention over pages of packed groups on TPU: a block is some pages of a row, each copied by itself."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import chips, compat, tuning
from pallas_kernels.calls import Interpret, Known, div
from pallas_kernels.decode_attention.products import integer
from pallas_kernels.decode_attention.rows import attend_rows
from pallas_kernels.kivi_attention.products import PackedInside
from pallas_kernels.paged_decode_attention.pages import PageCopies


def paged_kivi_attention(
    q: Float[Array, "B T N H"],
    codes: UInt8[Array, "P 2 K bytes H"],
    key_grids: Float[Array, "P 2 K groups H"],
    value_grids: Float[Array, "P 2 KR page"],
    table: Int[Known, "B M"],
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

    `blocks`: slots a block (whole pages of them), key heads a block, buffers, splits; by default those tuned for the
    chip.

    Raises:
        NotImplementedError: groups that do not fill whole tiles of bytes.
        ValueError: blocks that need too much VMEM.
    """
    K, page = codes.shape[2], value_grids.shape[3]
    if group % 64:
        raise NotImplementedError(f"group={group}: must be a multiple of 64 tokens, whose bytes fill whole tiles")
    chosen = blocks or tuning.blocks("paged_kivi_attention", chips.current().name, shape_class(q, codes, group=group))
    store = PackedPages(
        [codes, key_grids, value_grids], table, group,
        pages=max(1, min(chosen["slots"] // page, table.shape[1])), heads=math.gcd(chosen["heads"], K),
        depth=chosen["buffers"],
    )  # fmt: skip
    out, lse, _ = attend_rows(
        "paged_kivi_attention", q, store, K, table.shape[1] * page, length, scale=scale, start=None,
        position=position, window=window, sinks=0, softcap=softcap, tree=None, return_lse=return_lse,
        splits=chosen["splits"], interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def shape_class(q: Any, codes: Any, *_, group: int, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: the pages' shape and the tokens of a group."""
    _, _, K, half, H = codes.shape
    return {"K": K, "page": 2 * half, "H": H, "group": group}


class PackedPages:
    """Pages of packed groups as a store of `attend_rows`: a block is `pages` pages of `heads` heads."""

    updated = 0

    def __init__(
        self, arrays: Sequence[Array], table: Int[Known, "B M"], group: int, *, pages: int, heads: int, depth: int
    ):
        self.scalars = (table,)
        self.arrays = list(arrays)
        self.specs = [pl.BlockSpec(memory_space=compat.ANY)] * len(self.arrays)
        K, self.head_dim, self.page = arrays[0].shape[2], arrays[0].shape[4], arrays[2].shape[3]
        self.runs = arrays[2].shape[2] // K
        self.pages, self.heads, self.depth, self.group = pages, heads, depth, group
        self.slots = pages * self.page

    def scratch(self, rows: int, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into."""
        self.integer = integer(jnp.int8, dtype, rows)
        each = (self.heads, self.heads, self.heads * self.runs)
        buffers = [
            compat.VMEM((self.depth, self.pages, 2, n, *x.shape[3:]), x.dtype)
            for n, x in zip(each, self.arrays, strict=True)
        ]
        return [*buffers, compat.dma_semaphores(self.depth, len(buffers))]

    def inside(self, scalars: Sequence[Any], arrays: Sequence[Any], updated: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        del updated
        return _PackedPagesInside(self, scalars[0], arrays, scratch)


class _PackedPagesInside(PackedInside):
    def __init__(self, store: PackedPages, table: Any, arrays: Sequence[Any], scratch: Sequence[Any]):
        self.store, self.table, self.arrays = store, table, arrays
        self.buffers, self.semaphores = scratch[:-1], scratch[-1]

    def copies(self, row, first_head, block, buffer, end) -> list[Any]:
        """Return the copies of a block into a buffer: of the pages that have a live slot."""
        store = self.store
        live = jnp.minimum(div(end + store.page - 1, store.page) - block * store.pages, store.pages)
        found = []
        for i, (array, to) in enumerate(zip(self.arrays, self.buffers, strict=True)):
            size = to.shape[3]
            at = first_head * store.runs if i == 2 else first_head
            # All heads begin at 0, which the compiler must know of what fills no tile.
            own = pl.ds(0 if size == array.shape[2] else pl.multiple_of(at, size), size)

            def source(j, array=array, own=own):
                return array.at[self.table[row, block * store.pages + j], :, own]

            found.append(PageCopies(source, to, buffer, self.semaphores.at[buffer, i], live))
        return found

    def codes(self, i, h, buffer):
        """Return the bytes of a head."""
        return self.buffers[0][buffer, :, i, h].reshape(self.store.slots // 2, self.store.head_dim)

    def key_grid(self, h, buffer):
        """Return the scales and the offsets of a head's keys."""
        return tuple(
            jnp.concatenate([self.buffers[1][buffer, j, i, h] for j in range(self.store.pages)]).astype(jnp.float32)
            for i in (0, 1)
        )

    def value_grid(self, h, buffer):
        """Return the scales and the offsets of a head's values."""
        own = slice(h * self.store.runs, (h + 1) * self.store.runs)
        pages = range(self.store.pages)
        return tuple(
            jnp.concatenate([self.buffers[2][buffer, j, i, own] for j in pages], axis=1).astype(jnp.float32)
            for i in (0, 1)
        )
