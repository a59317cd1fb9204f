"""What the splits of a row found, made one: a kernel of its own, since XLA would need three for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.decode_attention.gpu_lanes import LOG2E
from pallas_kernels.decode_attention.gpu_masks import BY_SLOT

MOST_SPLITS = 64  # all of them are read at once: their latency is paid once, and registers hold them


def merge(out: Float[Array, "X S R H"], lse: Float[Array, "X S C"], rows: int, dtype: Any, overlap: bool = False):
    """Return the attention `[X, rows, H]` over all splits, in `dtype`, and the log of its total `[X, rows]`.

    `lse` is each split's, -inf where it saw nothing; in both, what follows `rows` is padding. `overlap`: to be launched
    before the kernel that writes `out` has ended, and to wait for it.
    """
    groups, splits, _, H = out.shape
    if H % 64:
        return by_xla(out, lse, rows, dtype)
    layout = BY_SLOT if H % 128 else plgpu.Layout.WG_STRIDED((H,), vec_size=H // 128)

    def body(out_ref: Any, lse_ref: Any, found_ref: Any, total_ref: Any) -> None:
        if overlap:
            plgpu.griddepcontrol_wait()
            plgpu.griddepcontrol_launch_dependents()
        group, row = jax.lax.axis_index("groups"), jax.lax.axis_index("rows")
        logs = [lse_ref[group, i, row] for i in range(splits)]
        parts = [compat.load(out_ref.at[group, i, row], layout) for i in range(splits)]
        peak = functools.reduce(jnp.maximum, logs)
        shift = jnp.where(peak == -jnp.inf, 0.0, peak)
        weights = [jnp.exp2((x - shift) * LOG2E) for x in logs]
        total = functools.reduce(jnp.add, weights)
        safe = jnp.where(total == 0.0, 1.0, total)
        mixed = functools.reduce(jnp.add, [x * y for x, y in zip(parts, weights, strict=True)])
        found_ref.at[group, row][...] = (mixed * (1.0 / safe)).astype(dtype)
        total_ref[group, row] = peak + jnp.log(safe)

    return compat.gpu_kernel(
        body,
        name="merge_splits",
        out_type=[jax.ShapeDtypeStruct((groups, rows, H), dtype), jax.ShapeDtypeStruct((groups, rows), jnp.float32)],
        grid=(groups, rows),
        grid_names=("groups", "rows"),
    )(out, lse)


def by_xla(out: Float[Array, "X S R H"], lse: Float[Array, "X S C"], rows: int, dtype: Any, overlap: bool = False):
    """Return what `merge` does."""
    del overlap
    out, lse = out[:, :, :rows], lse[..., :rows]
    peak = lse.max(axis=1)
    weight = jnp.exp(lse - jnp.where(peak == -jnp.inf, 0, peak)[:, None])
    total = weight.sum(axis=1)
    safe = jnp.where(total == 0, 1, total)
    mixed = (out * weight[..., None]).sum(axis=1) / safe[..., None]
    return mixed.astype(dtype), peak + jnp.log(safe)
