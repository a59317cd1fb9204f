"""The norm on a Hopper GPU: a warpgroup a row, which it reads once and holds in registers."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.calls import Interpret

THREADS = 128
MOST = 8192  # numbers of a row: registers hold them all


def rms_norm(
    x: Float[Array, "M D"],
    scale: Float[Array, "D"],
    *,
    eps: float,
    add: Float[Array, "M D"] | None = None,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
) -> Float[Array, "M D"] | tuple[Float[Array, "M D"], Float[Array, "M D"]]:
    """Return what the contract of this folder says; there are no `blocks` to choose.

    Raises:
        NotImplementedError: a dtype or a width that the kernel does not take.
    """
    del blocks
    (M, D), dtype = x.shape, x.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x of {dtype}: must be bfloat16 or float16 on a GPU")
    if D % THREADS or D > MOST:
        raise NotImplementedError(f"D={D}: must be a multiple of {THREADS}, and at most {MOST}, on a GPU")
    each = next(n for n in (8, 4, 2, 1) if D % (THREADS * n) == 0)
    layout = plgpu.Layout.WG_STRIDED((D,), vec_size=each)

    def body(*refs: Any) -> None:
        given, (*sums, out_ref) = refs[: len(inputs)], refs[len(inputs) :]
        row = jax.lax.axis_index("rows")
        scale_ref, *rows = given
        gain = compat.load(scale_ref, layout).astype(jnp.float32)
        wide = compat.load(rows[0].at[row], layout).astype(jnp.float32)
        for ref, sum_ref in zip(rows[1:], sums, strict=True):
            total = (wide + compat.load(ref.at[row], layout).astype(jnp.float32)).astype(dtype)
            sum_ref.at[row][...] = total
            wide = total.astype(jnp.float32)
        factor = jax.lax.rsqrt(jnp.sum(wide * wide) * (1.0 / D) + eps)
        out_ref.at[row][...] = (wide * factor * gain).astype(dtype)

    inputs = [scale, x] if add is None else [scale, x, add]
    outputs = [jax.ShapeDtypeStruct((M, D), dtype)] * (len(inputs) - 1)
    found = compat.gpu_kernel(
        body, name="rms_norm", out_type=outputs, grid=(M,), grid_names=("rows",), interpret=interpret
    )(*inputs)
    return found[0] if add is None else tuple(found)
