"""Packing on a Hopper GPU: threads hold their numbers of a group in registers; rows that complete none do nothing."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import compat
from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention.gpu_masks import NUMBER
from pallas_kernels.kivi_pack.gpu_thread import WARPS, Sizes, pack_keys, pack_values

WIDTHS, GROUPS = (64, 128, 256), (32, 64, 128)
MOST_BYTES = 1 << 31  # of a row: threads count them in words
NAMES = ("codes", "scale", "offset")


def kivi_pack(
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    k_codes: UInt8[Array, "B K bytes H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_codes: UInt8[Array, "B K bytes H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    *,
    group: int,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
) -> tuple[tuple[Array, ...]]:
    """Return what the contract of this folder says; there are no `blocks` to choose.

    Raises:
        NotImplementedError: a dtype or a size that the kernel does not take.
    """
    del blocks
    stores = [k_codes, k_scale, k_offset, v_codes, v_scale, v_offset]
    return (pack("kivi_pack", k, v, start, counts, Rows(stores), group, interpret),)


class Rows:
    """Groups in the rows that they are of: the arrays of `kivi_attention`."""

    kept = ()

    def __init__(self, stores: list[Array]):
        self.stores = stores
        self.groups = self.most = stores[1].shape[2]
        self.runs = stores[4].shape[1] // stores[0].shape[1]

    def find(self, kept: Any, stores: Any, row: Any, index: Any, of: int) -> tuple[Any, list[Any]]:
        """Return a group's place, and the refs of codes, scales and offsets that have it: of keys, or of values, 1."""
        del kept
        return index, [ref.at[row] for ref in stores[3 * of : 3 * of + 3]]


def pack(
    name: str,
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    source: Any,
    group: int,
    interpret: Interpret,
) -> tuple[Array, ...]:
    """Return the `stores` of a source of packed groups with those that rows complete."""
    if interpret:
        raise NotImplementedError("interpret: the kernel is written in the GPU's instructions")
    B, K, R, H = k.shape
    sizes = Sizes(heads=K, H=H, R=R, G=group, M=source.groups, run=H // source.runs)
    _check(k, source, sizes)
    inputs = [k, v, jnp.asarray(start, jnp.int32), jnp.asarray(counts, jnp.int32), *source.kept]

    def body(*refs: Any) -> None:
        (*rings, start, counts), rest = refs[:4], refs[4:]
        kept, stores = rest[: len(source.kept)], rest[len(source.kept) :]
        row, four, of = (jax.lax.axis_index(name) for name in ("rows", "warps", "of"))
        first, size = start[row], jnp.int32(group)
        index, end = jax.lax.div(first, size), jax.lax.div(first + counts[row], size)
        complete = (end > index) & (index < source.most)
        for i, run in enumerate((pack_keys, pack_values)):

            @pl.when(complete & (of == i))
            def _(i: int = i, run: Any = run) -> None:
                place, found = source.find(kept, stores, row, index, i)
                refs = dict(zip(NAMES, found, strict=True)) | {"ring": rings[i].at[row]}
                _run(run, sizes, refs, four, place, jax.lax.rem(index * size, jnp.int32(R)))

    call = compat.gpu_kernel_in_place(
        body, name=name, out_types=[], grid=(B, pl.cdiv(sizes.warps, WARPS), 2),
        grid_names=("rows", "warps", "of"),
    )  # fmt: skip
    _, changed = call(inputs, source.stores)
    return tuple(changed)


def _run(pack: Any, sizes: Sizes, refs: dict[str, Any], *numbers: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(dict.fromkeys(refs, plgpu.RefType()), NUMBER, NUMBER, NUMBER), return_type=())
    def run(_: Any, refs: Any, *numbers: Any) -> tuple[()]:
        pack(sizes, refs, *(number.registers.item() for number in numbers))
        return ()

    run(refs, *numbers)


def _check(ring: Array, source: Any, sizes: Sizes) -> None:
    """Raise NotImplementedError for what the kernel does not take."""
    codes, scale, *_ = source.stores
    for what, dtype in (("a ring", ring.dtype), ("grids", scale.dtype)):
        if dtype != jnp.bfloat16:
            raise NotImplementedError(f"{what} of {dtype}: must be bfloat16 on a GPU")
    if sizes.H not in WIDTHS or sizes.G not in GROUPS:
        raise NotImplementedError(
            f"groups of {sizes.G}, H={sizes.H}: must be of 32, 64 or 128, and H 64, 128 or 256, on a GPU"
        )
    if sizes.run not in GROUPS:
        raise NotImplementedError(f"H={sizes.H} in {source.runs} runs: must be of 32, 64 or 128 channels on a GPU")
    if sizes.R % sizes.G:
        raise NotImplementedError(f"a ring of {sizes.R} slots: must be a multiple of the group's {sizes.G} on a GPU")
    if max(2 * ring[0].size, codes[0].size, 2 * scale[0].size) >= MOST_BYTES:
        raise NotImplementedError(f"a row of {codes.shape[1:]} bytes: must be below 2 GiB on a GPU")
