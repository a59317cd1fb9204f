"""Attention over pages of packed groups on a Hopper GPU: the kernel of packed groups, a block copied page by page."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention.gpu_plan import Groups
from pallas_kernels.decode_attention.gpu_rows import attend_rows
from pallas_kernels.kivi_attention import gpu_nibbles
from pallas_kernels.paged_decode_attention.gpu_pages import Pages


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

    `blocks`: slots a block, 128 or 256, stages in flight, splits of a row, and whether these are a `cluster`; by
    default what fills the GPU.

    Raises:
        NotImplementedError: dtypes or sizes that the kernel does not take; an interpreter.
        ValueError: blocks that are not to be had.
    """
    pages = {"codes": codes, "key_grids": key_grids, "value_grids": value_grids}
    source = PackedPages(pages, jnp.asarray(table, jnp.int32), group)
    return attend_rows(
        "paged_kivi_attention", q, source, codes.shape[2], source.capacity, length, scale=scale, start=None,
        position=position, window=window, sinks=0, softcap=softcap, tree=None, return_lse=return_lse, blocks=blocks,
        interpret=interpret,
    )  # fmt: skip


class PackedPages:
    """Pages of packed groups, keys and values side by side, and the table that says whose they are."""

    threads = gpu_nibbles

    def __init__(self, pages: Mapping[str, Array], table: Int[Array, "B M"], group: int):
        self._number, _, self._heads, half, _ = pages["codes"].shape
        self._page, self._most = 2 * half, table.shape[1]
        if self._page not in (32, 64) and self._page % 128:
            raise NotImplementedError(f"page={self._page}: must be 32, 64, or a multiple of 128 on a GPU")
        runs = pages["value_grids"].shape[2] // self._heads
        self.capacity = self._most * self._page
        self.groups = Groups(group, runs, self._page)
        self.dtypes = pages["codes"].dtype, pages["key_grids"].dtype
        # Pages, keys and values, and heads as one axis: copies have few.
        flat = self._number * 2 * self._heads
        self.arrays = {
            "codes": pages["codes"].reshape(flat, half, -1),
            "key_grids": pages["key_grids"].reshape(flat, half * 2 // group, -1),
            "value_grids": pages["value_grids"].reshape(flat, runs, self._page),
            "table": table,
        }

    def fit(self, slots: int) -> int:
        """Return the slots of a block: whole pages, or a part of one."""
        slots = slots if slots % self._page == 0 or self._page % slots == 0 else 128
        self._pages = Pages(self._number, self._page, self._most, slots)
        return slots

    def copies_of(self, slots: int) -> int:
        """Return how many copies a block of keys comes in, its grids' counted."""
        return 3 * max(1, slots // self._page)

    def find(self, refs: dict[str, Any], b: Any, head: Any, base: Any, end: Any) -> Any:
        """Return where the block from slot `base` is: its pages' keys."""
        found = self._pages.find(refs["table"], b, base, end)
        return head, [(number * (2 * self._heads) + head, inside) for number, inside in found]

    def copies(self, refs: dict[str, Any], memory: dict[str, Any], name: str, where: Any, stage: Any) -> None:
        """Start to copy a block of keys, "k", or values, "v", with its grids."""
        head, pages = where
        barrier, part, group = memory[f"{name}_barrier"].at[stage], self._pages.part, self.groups.size
        codes = memory[name].at[stage]
        width = pl.ds(head * 0, codes.shape[1])
        for i, (first, inside) in enumerate(pages):
            held = first if name == "k" else first + self._heads
            own, here = _rows(inside, i, part, 2)
            plgpu.copy_gmem_to_smem(refs["codes"].at[held, own, width], codes.at[here], barrier)
            for grid, line in ((f"{name}_scale", first), (f"{name}_offset", first + self._heads)):
                to = memory[grid].at[stage]
                if name == "k":
                    own, here = _rows(inside, i, part, group)
                    plgpu.copy_gmem_to_smem(refs["key_grids"].at[line, own], to.at[here], barrier)
                else:
                    own = pl.ds(inside, part)
                    plgpu.copy_gmem_to_smem(refs["value_grids"].at[line, slice(None), own], to.at[i], barrier)


def _rows(inside: Any, i: int, part: int, size: int) -> tuple[Any, Any]:
    """Return the rows of `size` slots each of a part: in its page from slot `inside`, and in the block."""
    count = part // size
    first = inside if isinstance(inside, int) else jax.lax.div(inside, jnp.int32(size))  # 0, or not known
    return pl.ds(first, count), pl.ds(i * count, count)
