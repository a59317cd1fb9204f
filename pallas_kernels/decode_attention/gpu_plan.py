"""The shapes of a call of decode attention on Hopper, and the shared memory that they need."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.gpu_cluster import Cluster

LETTERS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
SCALES = ("k_scale", "v_scale")


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a cache of 4-bit codes is packed: see `kivi_attention`."""

    size: int  # tokens that share a row of bytes' order, and a grid of each channel of their keys
    runs: int  # of channels of a value that share a grid
    together: int  # tokens that lie together: those of a page, or all

    def stage_bytes(self, slots: int, H: int, grid_bytes: int) -> int:
        """Return the shared memory that a block of keys and values takes, with its grids."""
        return slots * H + 2 * 2 * grid_bytes * (slots // self.size * H + slots * self.runs)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of one call. Row r of the `rows` query rows of a key head is token `r % tokens`."""

    kv_heads: int
    rows: int
    columns: int  # query rows of one block of the grid
    tokens: int
    capacity: int  # slots that a row of the cache has at most
    slots: int
    stages: int
    splits: int
    cluster: Cluster | None  # the blocks of a row's splits, where they merge what they found themselves
    H: int
    dtype: Any  # of the products
    stored: Any  # of the cache
    scales: Any  # of its scales, or None
    groups: Groups | None  # of 4-bit codes, whose scales are those of groups
    out_dtype: Any
    scale: float
    softcap: float | None
    window: int | None
    sinks: int
    tree_words: int  # 32 nodes each; 0 where there is no tree
    with_lse: bool
    overlap: bool  # with the kernels before and after: begins before the one before has ended, and waits for that
    has_start: bool
    has_position: bool
    ring: bool  # slots are those of the newest positions
    plain: bool  # no instructions of the hardware's own: what the interpreter knows

    @property
    def width(self) -> int:
        """The head's numbers in shared memory, in whole tiles; past H a copy fills in zeros."""
        return -(-self.H // 64) * 64

    @property
    def tiles(self) -> int:
        """Blocks of the grid that share a key head's cache."""
        return -(-self.rows // self.columns)

    @property
    def exact(self) -> bool:
        """Whether the output has no padding: what a block writes lies in one piece there."""
        return self.tiles == 1 and self.width == self.H

    @property
    def by_warps(self) -> bool:
        """Whether codes are multiplied by each warp for itself: see `gpu_warp`."""
        return by_warps(self.scales, self.columns, self.H) and self.slots % 128 == 0 and not self.plain

    @property
    def letters(self) -> str:
        """What the instructions call the type of the output."""
        return LETTERS[jnp.dtype(self.out_dtype).name]

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.scales is not None


def by_warps(scales: Any, columns: int, H: int) -> bool:
    """Return whether a cache of such scales, or None, is one that warps could attend to each for itself."""
    return scales is not None and columns == 8 and H % 64 == 0


def scratch(plan: Plan, copies: int) -> dict[str, Any]:
    """Return the shared memory and the barriers; a block of keys, or values, comes in `copies` copies."""
    stage = (plan.stages, plan.slots, plan.width)
    barriers = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages)
    barriers = {"k_barrier": barriers, "v_barrier": barriers}
    if plan.groups is None:
        scales = {name: plgpu.SMEM((plan.stages, plan.slots), plan.scales) for name in SCALES if plan.quantized}
    else:
        stage = (plan.stages, plan.slots // 2, plan.width)
        scales = _grids(plan)
    sent = {} if plan.cluster is None else {"parts": plgpu.SMEM((plan.cluster.floats,), jnp.float32)}
    if plan.by_warps:
        blocks = {name: _tiled(stage, plan.stored, swizzle(plan.H, plan.stored)) for name in "kv"}
        return blocks | scales | sent | barriers
    queries, keys = swizzle(plan.H, plan.dtype), swizzle(plan.H, plan.stored)
    beside = 128 if plan.quantized else keys  # both operands of a product are laid out alike
    found = {
        "q": _tiled((plan.columns, plan.width), plan.dtype, queries),
        "k": _tiled(stage, plan.stored, keys),
        "v": _tiled(stage, plan.stored, keys),
        "weights": _tiled((plan.columns, plan.slots), plan.dtype, beside),
        "q_barrier": plgpu.Barrier(),
    }
    found |= sent or {"out": plgpu.SMEM((plan.columns, plan.width), plan.out_dtype)}
    if plan.quantized:
        found["wide"] = _tiled((plan.slots, plan.width), plan.dtype, beside)
        found |= scales
    return found | barriers


def _grids(plan: Plan) -> dict[str, Any]:
    """Return the shared memory of the scales and offsets of groups: of values, those of tokens that lie together."""
    together = min(plan.groups.together, plan.slots)
    keys = (plan.stages, plan.slots // plan.groups.size, plan.H)
    values = (plan.stages, plan.slots // together, plan.groups.runs, together)
    return {
        f"{name}_{grid}": plgpu.SMEM(shape, plan.scales)
        for name, shape in (("k", keys), ("v", values))
        for grid in ("scale", "offset")
    }


def swizzle(H: int, dtype: Any) -> int:
    """Return the bytes of a line of a tile in shared memory: the most of which a head is a multiple.

    Raises:
        NotImplementedError: there is no such number.
    """
    size = jnp.dtype(dtype).itemsize
    for found in (128, 64, 32):
        if H * size % found == 0:
            return found
    raise NotImplementedError(f"H={H} of {dtype}: must be a multiple of {32 // size} on a GPU")


def _tiled(shape: tuple[int, ...], dtype: Any, line: int) -> Any:
    transforms = (plgpu.TilingTransform((8, line // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(line))
    return plgpu.SMEM(shape, dtype, transforms=transforms)
