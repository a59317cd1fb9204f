"""Rotation and append on a Hopper GPU: a warp takes a head of a token, whose numbers its threads hold in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import compat
from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention.gpu_masks import NUMBER
from pallas_kernels.rope_append.gpu_thread import WARPS, Heads, rotate_and_write

WIDTHS = (64, 128, 256)  # numbers of a head: those of a thread are read, and written, at once
MOST_BYTES = 1 << 31  # of a row's cache: threads count them in words


def rope_append(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    k_cache: Array,
    v_cache: Array,
    k_scale: Float[Array, "rows K S"] | None = None,
    v_scale: Float[Array, "rows K S"] | None = None,
    *,
    ring: bool = False,
    table: Int[Known, "B M"] | None = None,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
) -> tuple[Float[Array, "B T N H"], tuple[Array, ...]]:
    """Return what the contract of this folder says; there are no `blocks` to choose.

    Raises:
        NotImplementedError: a dtype or a size that the kernel does not take.
    """
    del blocks
    if interpret:
        raise NotImplementedError("interpret: the kernel is written in the GPU's instructions")
    (B, T, N, H), K, S = q.shape, k.shape[2], k_cache.shape[2]
    caches = {"k": k_cache, "v": v_cache}
    if k_scale is not None:
        caches |= {"k_scale": k_scale, "v_scale": v_scale}
    _check(q, caches)
    if ring and T > S:
        raise NotImplementedError(f"{T} tokens: must be at most the {S} slots of a ring on a GPU")
    heads = Heads(N, K, H, S, k_cache.dtype.name)
    inputs = {
        "heads": jnp.concatenate((q, k, v), axis=2).reshape(B * T, -1),  # parts of one array are that array again
        "cos": cos.reshape(B * T, -1), "sin": sin.reshape(B * T, -1),
        "start": jnp.asarray(start, jnp.int32), "counts": jnp.asarray(counts, jnp.int32),
    }  # fmt: skip
    if table is not None:
        inputs["table"] = jnp.asarray(table, jnp.int32)
    names = [*inputs, *caches, "q"]

    def body(*given: Any) -> None:
        refs = dict(zip(names, given, strict=True))
        token, group = jax.lax.axis_index("tokens"), jax.lax.axis_index("heads")
        row, at = jax.lax.div(token, jnp.int32(T)), jax.lax.rem(token, jnp.int32(T))
        slot = refs["start"][row] + at
        kept = at < refs["counts"][row]
        if ring:
            slot = jax.lax.rem(slot, jnp.int32(S))
        elif table is not None:
            kept &= slot < S * table.shape[1]
            # Of what is not kept no entry is read: it may be past the table's, or name no page.
            index, slot = jax.lax.div(slot, jnp.int32(S)), jax.lax.rem(slot, jnp.int32(S))
            row = jnp.where(kept, refs["table"][row, jnp.where(kept, index, 0)], 0)
        else:
            kept &= slot < S
        of_token = {name: refs[name].at[token] for name in ("heads", "cos", "sin", "q")}
        of_row = {name: refs[name].at[row] for name in caches}  # or of a page
        _run(heads, of_token | of_row, group, slot, jnp.where(kept, 1, 0))

    call = compat.gpu_kernel_in_place(
        body, name="rope_append", out_types=[jax.ShapeDtypeStruct((B * T, N * H), q.dtype)],
        grid=(B * T, pl.cdiv(heads.all, WARPS)), grid_names=("tokens", "heads"),
    )  # fmt: skip
    (rotated,), changed = call(list(inputs.values()), list(caches.values()))
    return rotated.reshape(B, T, N, H), tuple(changed)


def _run(heads: Heads, refs: dict[str, Any], *numbers: Any) -> None:
    @plgpu.inline_mgpu(arg_types=(dict.fromkeys(refs, plgpu.RefType()), NUMBER, NUMBER, NUMBER), return_type=())
    def run(_: Any, refs: Any, *numbers: Any) -> tuple[()]:
        rotate_and_write(heads, refs, *(number.registers.item() for number in numbers))
        return ()

    run(refs, *numbers)


def _check(q: Array, caches: dict[str, Array]) -> None:
    """Raise NotImplementedError for what the kernel does not take."""
    stored, scale = caches["k"].dtype, caches.get("k_scale")
    if q.dtype != jnp.bfloat16:
        raise NotImplementedError(f"q of {q.dtype}: must be bfloat16 on a GPU")
    if stored not in ((jnp.bfloat16,) if scale is None else (jnp.int8, jnp.uint8)):
        raise NotImplementedError(f"a cache of {stored}: must be bfloat16, or int8 or uint8 with scales, on a GPU")
    if scale is not None and scale.dtype != jnp.bfloat16:
        raise NotImplementedError(f"scales of {scale.dtype}: must be bfloat16 on a GPU")
    if q.shape[3] not in WIDTHS:
        raise NotImplementedError(f"H={q.shape[3]}: must be 64, 128 or 256 on a GPU")
    if caches["k"][0].size * stored.itemsize >= MOST_BYTES:
        raise NotImplementedError(f"a row's cache of {caches['k'].shape[1:]} {stored}: must be below 2 GiB on a GPU")
