"""From the bytes of a quantized cache to what Hopper's matrix units multiply."""

from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four bytes beside each other in a thread


def widen(ref: Any, dtype: Any, layout: Any) -> Any:
    """Return what a ref holds, `[slots, H]` in codes of a byte, as numbers of `dtype`; in `layout`, or any for None."""
    codes = compat.load(ref, BYTES, optimized=True)
    if codes.dtype == jnp.int8:
        wide = codes.astype(dtype)
    else:
        raise NotImplementedError(f"codes of {codes.dtype}")
    return wide if layout is None else plgpu.layout_cast(wide, layout)
