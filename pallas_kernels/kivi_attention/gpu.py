"""Attention over packed groups on a Hopper GPU: the kernel of quantized caches, whose threads take codes of 4 bits."""

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

    `blocks`: slots a block, 128 or 256, stages in flight, splits of a row, and whether these are a `cluster`; by
    default what fills the GPU.

    Raises:
        NotImplementedError: dtypes or sizes that the kernel does not take; an interpreter.
        ValueError: blocks that are not to be had.
    """
    K, S = k_codes.shape[1], v_scale.shape[2]
    arrays = {"k": k_codes, "v": v_codes, "k_scale": k_scale, "k_offset": k_offset}
    source = Packed(arrays | {"v_scale": v_scale, "v_offset": v_offset}, group)
    return attend_rows(
        "kivi_attention", q, source, K, S, length, scale=scale, start=None, position=position, window=window, sinks=0,
        softcap=softcap, tree=None, return_lse=return_lse, blocks=blocks, interpret=interpret,
    )  # fmt: skip


ALL = 1 << 30  # tokens lie together


class Packed:
    """Codes `[B, K, S / 2, H]` of keys and values, with grids of keys `[B, K, M, H]` and of values `[B, K * runs, S]`.

    Blocks may reach past the cache.
    """

    threads = gpu_nibbles

    def __init__(self, arrays: dict[str, Array], group: int):
        self.arrays = arrays
        self.groups = Groups(group, arrays["v_scale"].shape[1] // arrays["k"].shape[1], ALL)
        self.dtypes = arrays["k"].dtype, arrays["k_scale"].dtype

    def fit(self, slots: int) -> int:
        """Return the slots of a block."""
        return slots

    def copies_of(self, slots: int) -> int:
        """Return how many copies a block of keys comes in, its grids' counted."""
        del slots
        return 3

    def find(self, refs: dict[str, Any], b: Any, head: Any, base: Any, end: Any) -> Any:
        """Return where the block from slot `base` is."""
        del refs, end
        return b, head, base

    def copies(self, refs: dict[str, Any], memory: dict[str, Any], name: str, where: Any, stage: Any) -> None:
        """Start to copy a block of keys, "k", or values, "v", with its grids."""
        b, head, base = where
        to, barrier = memory[name].at[stage], memory[f"{name}_barrier"].at[stage]
        # Where a copy begins is not known when it is compiled, or jax would not allow it to reach past the end.
        row, width = jax.lax.div(base, jnp.int32(2)), pl.ds(head * 0, to.shape[1])
        plgpu.copy_gmem_to_smem(refs[name].at[b, head, pl.ds(row, to.shape[0]), width], to, barrier)
        for grid in (f"{name}_scale", f"{name}_offset"):
            to = memory[grid].at[stage]
            if name == "k":
                first = jax.lax.div(base, jnp.int32(self.groups.size))
                found = refs[grid].at[b, head, pl.ds(first, to.shape[0]), pl.ds(head * 0, to.shape[1])]
            else:
                to = to.at[0]
                lines = pl.ds(head * self.groups.runs, self.groups.runs)
                found = refs[grid].at[b, lines, pl.ds(base, to.shape[1])]
            plgpu.copy_gmem_to_smem(found, to, barrier)
