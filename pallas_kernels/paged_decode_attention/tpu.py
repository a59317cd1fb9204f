"""Paged decode attention on TPU: a block is some pages of a row, each copied by itself; new tokens are put into the
block in VMEM, and the tiles that hold them are copied back while the block is used.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import chips, compat, tuning
from pallas_kernels.calls import Interpret, Known, div, rem
from pallas_kernels.decode_attention import products
from pallas_kernels.decode_attention.rows import attend_rows
from pallas_kernels.decode_attention.tpu import numbers
from pallas_kernels.paged_decode_attention.pages import PageCopies


def paged_decode_attention(
    q: Float[Array, "B T N H"],
    k_pages: Array,
    v_pages: Array,
    table: Int[Known, "B M"],
    length: Int[Known, "B"],
    *,
    scale: float,
    new: Mapping[str, Array] | None = None,
    start: Int[Known, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Known, "... T T"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: slots a block (whole pages of them), key heads a block, buffers, splits; by default those tuned for the
    chip.

    Raises:
        NotImplementedError: a page is not a whole number of the dtype's tiles.
        ValueError: blocks that need too much VMEM.
    """
    _, K, page, H = k_pages.shape
    chip = chips.current()
    tile = 32 // k_pages.dtype.itemsize
    if page % tile:
        raise NotImplementedError(f"page={page}: must be a multiple of {tile} slots of {k_pages.dtype}")
    chosen = blocks or tuning.fitting(
        tuning.blocks("paged_decode_attention", chip.name, shape_class(q, k_pages)),
        2 * min(K, 8) * H * k_pages.dtype.itemsize,
        chip,
    )
    store = Paged(
        {"k": k_pages, "v": v_pages} | ({} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale}),
        table, new,
        pages=max(1, min(chosen["slots"] // page, table.shape[1])), heads=math.gcd(chosen["heads"], K),
        depth=chosen["buffers"], tokens=q.shape[1],
    )  # fmt: skip
    out, lse, pages = attend_rows(
        "paged_decode_attention", q, store, K, table.shape[1] * page, length, scale=scale, start=start, position=None,
        window=window, sinks=sinks, softcap=softcap, tree=tree, return_lse=return_lse, splits=chosen["splits"],
        interpret=interpret,
    )  # fmt: skip
    found = (out, *((lse,) if return_lse else ()), *((tuple(pages),) if new is not None else ()))
    return found[0] if len(found) == 1 else found


def shape_class(q: Any, k_pages: Any, *_, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: what the pages' numbers are, and their shape."""
    _, K, page, H = k_pages.shape
    return {**numbers(k_pages), "K": K, "page": page, "H": H}


class Paged:
    """Pages `[P, K, page, H]`, perhaps with scales `[P, K, page]`; a block is `pages` pages of `heads` heads."""

    def __init__(
        self,
        stored: Mapping[str, Array],
        table: Int[Known, "B M"],
        new: Mapping[str, Array] | None,
        *,
        pages: int,
        heads: int,
        depth: int,
        tokens: int,
    ):
        self.names = list(stored)
        self.scalars = (table,)
        self.updated = len(stored) if new is not None else 0
        self.arrays = list(stored.values())
        self.specs = [pl.BlockSpec(memory_space=compat.ANY)] * len(stored)
        _, K, self.page, self.head_dim = stored["k"].shape
        self.pages, self.heads, self.depth, self.tokens = pages, heads, depth, tokens
        self.slots = pages * self.page
        self.tile = 32 // stored["k"].dtype.itemsize  # slots of the smallest part of a page that a copy can write
        if new is not None:
            chunks = K // heads
            for name in self.names:
                # Float32 in VMEM: to select among the packed rows of a tile they are widened anyway.
                x = new[name].astype(jnp.float32).swapaxes(1, 2)  # [B, K, T, H] or [B, K, T]
                self.arrays.append(x)
                tail = (0,) * (x.ndim - 2)
                self.specs.append(
                    pl.BlockSpec(
                        (1, heads, *x.shape[2:]), lambda _, r, tail=tail: (div(r, chunks), rem(r, chunks), *tail)
                    )
                )

    def scratch(self, rows: int, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into, for `rows` query rows of `dtype`."""
        shapes = [
            compat.VMEM((self.depth, self.pages, self.heads, *x.shape[2:]), x.dtype)
            for x in self.arrays[: len(self.names)]
        ]
        shapes += [compat.dma_semaphores(self.depth, len(self.names)), compat.dma_semaphores(len(self.names))]
        self.integer = products.integer(self.arrays[0].dtype, dtype, rows)
        return shapes + (products.scratch(self.heads, rows, self.head_dim) if self.integer else [])

    def inside(self, scalars: Sequence[Any], arrays: Sequence[Any], updated: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        return _PagedInside(self, scalars[0], arrays, updated, scratch)


class _PagedInside:
    def __init__(self, store, table_ref, arrays, updated, scratch):
        count = len(store.names)
        self.store, self.table = store, table_ref
        # What is written is read by the same name: the interpreters keep an input and its output apart.
        self.arrays, self.new = (updated or arrays[:count]), arrays[count:]
        self.buffers, self.semaphores, self.writing = scratch[:count], scratch[count], scratch[count + 1]
        self.prepared = scratch[count + 2 :] or None

    def copies(self, row, first_head, block, buffer, end) -> list[Any]:
        """Return the copies of a block into a buffer: of the pages that have a live slot."""
        store = self.store
        heads = pl.ds(pl.multiple_of(first_head, store.heads), store.heads)
        live = jnp.minimum(div(end + store.page - 1, store.page) - block * store.pages, store.pages)
        found = []
        for i, (array, to) in enumerate(zip(self.arrays, self.buffers, strict=True)):

            def source(j, array=array):
                return array.at[self.table[row, block * store.pages + j], heads]

            found.append(PageCopies(source, to, buffer, self.semaphores.at[buffer, i], live))
        return found

    def begin(self, queries) -> None:
        """Prepare a row's queries, a list of one `[R, H]` a head."""
        if self.prepared:
            products.prepare(queries, *self.prepared)

    def scores(self, queries, buffer):
        """Return the scores of the block in a buffer, `[heads * R, slots]`."""
        return products.scores(queries, self._blocks(0, buffer), self._scales(2, buffer), self.prepared)

    def mixed(self, weights, buffer, dtype, alive):
        """Return its values under the weights, `[heads * R, H]`."""
        values, scales = self._blocks(1, buffer), self._scales(3, buffer)
        return products.mixed(weights, values, scales, dtype, alive, self.prepared is not None)

    def _blocks(self, i, buffer):
        store = self.store
        return [self.buffers[i][buffer, :, h].reshape(store.slots, store.head_dim) for h in range(store.heads)]

    def _scales(self, i, buffer):
        if len(self.buffers) == 2:
            return None
        scales = jnp.concatenate([self.buffers[i][buffer, j] for j in range(self.store.pages)], axis=1)
        return [scales[h : h + 1] for h in range(self.store.heads)]

    def write(self, row, first_head, base, buffer, length):
        """Put the new tokens that belong into this block there, and start to copy their tiles to HBM."""
        store = self.store
        if not store.updated:
            return

        @pl.when(base + store.slots > length - store.tokens)
        def _():
            for t in range(store.tokens):
                at = length - store.tokens + t - base

                @pl.when((at >= 0) & (at < store.slots) & (at + base >= 0))
                def _(t=t, at=at):
                    self._insert(t, at, buffer)

            for t in range(store.tokens):

                @pl.when(self._starts_tile(t, base, length))
                def _(t=t):
                    for copy in self._tiles(t, row, first_head, base, buffer, length):
                        copy.start()

    def wrote(self, row, first_head, base, buffer, length):
        """Wait until they are in HBM."""
        store = self.store
        if not store.updated:
            return

        @pl.when(base + store.slots > length - store.tokens)
        def _():
            for t in range(store.tokens):

                @pl.when(self._starts_tile(t, base, length))
                def _(t=t):
                    for copy in self._tiles(t, row, first_head, base, buffer, length):
                        copy.wait()

    def _insert(self, t, at, buffer):
        """Put token t into slot `at` of the block."""
        store = self.store
        page, slot = div(at, store.page), rem(at, store.page)
        first = pl.multiple_of(div(slot, store.tile) * store.tile, store.tile)
        for i, (to, new) in enumerate(zip(self.buffers, self.new, strict=True)):
            if i < 2:
                place = (buffer, page, slice(None), pl.ds(first, store.tile))
                token, line = new[0, :, t : t + 1, :], (store.heads, store.tile, store.head_dim)
                here = jax.lax.broadcasted_iota(jnp.int32, line, 1) == slot - first
            else:
                place = (buffer, page)
                token = new[0, :, t : t + 1]
                here = jax.lax.broadcasted_iota(jnp.int32, (store.heads, store.page), 1) == slot
            to[place] = jnp.where(here, token, to[place].astype(jnp.float32)).astype(to.dtype)

    def _starts_tile(self, t, base, length):
        """Return whether token t is the first of the new ones in its tile, and in this block."""
        store = self.store
        at = length - store.tokens + t
        inside = (at >= jnp.maximum(base, 0)) & (at < base + store.slots)
        if t == 0:
            return inside
        return inside & ((rem(jnp.maximum(at, 0), store.tile) == 0) | (at == 0) | (at == base))

    def _tiles(self, t, row, first_head, base, buffer, length):
        store = self.store
        at = length - store.tokens + t
        page, slot = div(at - base, store.page), rem(at - base, store.page)
        first = pl.multiple_of(div(slot, store.tile) * store.tile, store.tile)
        number = self.table[row, div(at, store.page)]
        heads = pl.ds(pl.multiple_of(first_head, store.heads), store.heads)
        copies = []
        for i, (array, source) in enumerate(zip(self.arrays, self.buffers, strict=True)):
            rows = (slice(None), pl.ds(first, store.tile)) if i < 2 else (slice(None),)
            here, there = source.at[(buffer, page, *rows)], array.at[(number, heads, *rows[1:])]
            copies.append(pltpu.make_async_copy(here, there, self.writing.at[i]))
        return copies
