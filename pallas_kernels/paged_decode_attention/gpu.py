"""Paged decode attention on a Hopper GPU: the dense kernel, a block of which is copied page by page.

New tokens are written by XLA, in place, before it.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention import gpu_warp
from pallas_kernels.decode_attention.gpu_rows import attend_rows
from pallas_kernels.paged_decode_attention.gpu_pages import Pages
from pallas_kernels.paged_decode_attention.reference import append, gather


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

    `blocks`: slots a block, a multiple of 64, stages in flight, splits of a row, and whether these are a `cluster`; by
    default what fills the GPU.

    Raises:
        NotImplementedError: dtypes or sizes that the kernel does not take.
        ValueError: a cluster of a number of splits that is not 1, 2, 4, 8 or 16.
    """
    pages = {"k": k_pages, "v": v_pages} | ({} if k_scale is None else {"k_scale": k_scale, "v_scale": v_scale})
    table, length = jnp.asarray(table, jnp.int32), jnp.asarray(length, jnp.int32)
    source = Paged(pages, table)
    if new is not None:
        pages = {name: append(x, new[name], table, length) for name, x in pages.items()}
    found = attend_rows(
        "paged_decode_attention", q, source.holding(pages, length), k_pages.shape[1], source.capacity, length,
        scale=scale, start=start, position=None, window=window, sinks=sinks, softcap=softcap, tree=tree,
        return_lse=return_lse, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    if new is None:
        return found
    return (*(found if return_lse else (found,)), tuple(pages.values()))


class Paged:
    """Pages `[P, K, page, H]`, perhaps with scales `[P, K, page]`, and the table that says whose they are."""

    threads = gpu_warp
    groups = None

    def __init__(self, pages: Mapping[str, Array], table: Int[Array, "B M"]):
        self._number, self._heads, self._page, _ = pages["k"].shape
        self._most = table.shape[1]
        self._table = table
        self.capacity = self._most * self._page
        scales = pages["k_scale"].dtype if "k_scale" in pages else None
        self.dtypes = pages["k"].dtype, scales
        # A copy of fewer bytes than a warpgroup has threads is not to be had.
        self._gathered = scales is not None and self._page * scales.itemsize % 128 != 0
        if self._page % 8 or (64 % self._page and self._page % 64):
            raise NotImplementedError(f"page={self._page}: must be 8, 16, 32, or a multiple of 64 on a GPU")
        if self._gathered and self.capacity * scales.itemsize % 16:
            raise NotImplementedError(f"{self.capacity} slots: their scales must be whole pieces of 16 bytes on a GPU")

    def holding(self, pages: Mapping[str, Array], length: Int[Array, "B"]) -> "Paged":
        """Return this with the arrays that the kernel is given: what is not gathered has its pages and heads in one."""
        self.arrays = {}
        live = jnp.arange(self._most) * self._page < length[:, None]
        for name, x in pages.items():
            if "scale" in name and self._gathered:
                self.arrays[name] = gather(x, jnp.where(live, self._table, 0))
            else:
                self.arrays[name] = x.reshape(self._number * self._heads, *x.shape[2:])
        self.arrays["table"] = self._table
        return self

    def fit(self, slots: int) -> int:
        """Return the slots of a block: whole pages, or a part of one."""
        sizes = range(slots, 0, -64)
        slots = next(size for size in sizes if size % self._page == 0 or self._page % size == 0)
        self._pages = Pages(self._number, self._page, self._most, slots)
        return slots

    def copies_of(self, slots: int) -> int:
        """Return how many copies a block of keys comes in, its scales' counted."""
        pages = max(1, slots // self._page)
        return pages + (0 if self.dtypes[1] is None else 1 if self._gathered else pages)

    def find(self, refs: dict[str, Any], b: Any, head: Any, base: Any, end: Any) -> Any:
        """Return where the block from slot `base` is: its pages."""
        found = self._pages.find(refs["table"], b, base, end)
        return b, head, base, [(number * self._heads + head, inside) for number, inside in found]

    def copies(self, refs: dict[str, Any], memory: dict[str, Any], name: str, where: Any, stage: Any) -> None:
        """Start to copy a block of keys, "k", or values, "v", with its scales."""
        b, head, base, pages = where
        to, barrier, scale = memory[name].at[stage], memory[f"{name}_barrier"].at[stage], f"{name}_scale"
        part = self._pages.part
        width = pl.ds(head * 0, to.shape[1])
        for i, (held, first) in enumerate(pages):
            here, inside = pl.ds(i * part, part), pl.ds(first, part)
            plgpu.copy_gmem_to_smem(refs[name].at[held, inside, width], to.at[here], barrier)
            if scale in refs and not self._gathered:
                plgpu.copy_gmem_to_smem(refs[scale].at[held, inside], memory[scale].at[stage, here], barrier)
        if scale in refs and self._gathered:
            slots = pl.ds(base, self._pages.slots)
            plgpu.copy_gmem_to_smem(refs[scale].at[b, head, slots], memory[scale].at[stage], barrier)
