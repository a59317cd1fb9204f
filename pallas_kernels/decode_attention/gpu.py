"""Decode attention on a Hopper GPU over a dense cache."""

from typing import Any

from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention import gpu_warp
from pallas_kernels.decode_attention.gpu_rows import attend_rows


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    length: Int[Known, "B"],
    *,
    scale: float,
    start: Int[Known, "B"] | None = None,
    position: Int[Known, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Known, "... T T"] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
    ring: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: slots a copy, a multiple of 64, stages in flight, splits of a row, and whether these are a cluster that
    merges what it finds itself (`cluster` 1), with no second kernel; by default what fills the GPU, and of a ring a
    cluster. Codes with few queries are multiplied as they are where slots are a multiple of 128.

    Raises:
        NotImplementedError: dtypes or sizes that the kernel does not take.
        ValueError: both position and tree, or a cluster of a number of splits that is not 1, 2, 4, 8 or 16.
    """
    if ring:
        if k_scale is not None or tree is not None or sinks:
            raise NotImplementedError("ring: must be without scales, a tree and sinks on a GPU")
        blocks = blocks or {"cluster": 1}
    return attend_rows(
        "decode_attention", q, Dense(k, v, k_scale, v_scale), k.shape[1], k.shape[2], length, scale=scale,
        start=start, position=position, window=window, sinks=sinks, softcap=softcap, tree=tree,
        return_lse=return_lse, ring=ring, blocks=blocks, interpret=interpret,
    )  # fmt: skip


class Dense:
    """A cache `[B, K, S, H]`, and where it is quantized its scales `[B, K, S]`."""

    threads = gpu_warp
    groups = None

    def __init__(
        self, k: Array, v: Array, k_scale: Float[Array, "B K S"] | None, v_scale: Float[Array, "B K S"] | None
    ):
        self.arrays = {"k": k, "v": v}
        if k.shape[2] > 8 and k.shape[2] % 8:
            raise NotImplementedError(f"{k.shape[2]} slots: must be a multiple of 8 on a GPU")
        if k_scale is not None:
            self.arrays |= {"k_scale": k_scale, "v_scale": v_scale}
            if k.shape[2] * k_scale.dtype.itemsize % 16:
                raise NotImplementedError(f"{k.shape[2]} slots: their scales must be whole pieces of 16 bytes on a GPU")
        self.dtypes = k.dtype, None if k_scale is None else k_scale.dtype

    def fit(self, slots: int) -> int:
        """Return the slots of a block: the last one may reach past the cache."""
        return slots

    def copies_of(self, slots: int) -> int:
        """Return how many copies a block of keys comes in, its scales' counted."""
        del slots
        return 1 if self.dtypes[1] is None else 2

    def find(self, refs: dict[str, Any], b: Any, head: Any, base: Any, end: Any) -> Any:
        """Return where the block from slot `base` is."""
        del refs, end
        return b, head, base

    def copies(self, refs: dict[str, Any], memory: dict[str, Any], name: str, where: Any, stage: Any) -> None:
        """Start to copy a block of keys, "k", or values, "v", with its scales."""
        b, head, base = where
        to, barrier = memory[name].at[stage], memory[f"{name}_barrier"].at[stage]
        slots = pl.ds(base, to.shape[0])
        plgpu.copy_gmem_to_smem(refs[name].at[b, head, slots, pl.ds(head * 0, to.shape[1])], to, barrier)
        if f"{name}_scale" in refs:
            scale = f"{name}_scale"
            plgpu.copy_gmem_to_smem(refs[scale].at[b, head, slots], memory[scale].at[stage], barrier)
