"""From what is stored to what is multiplied: codes of a byte as the floats that they stand for, without their scale."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike


def widen(codes: Array, dtype: DTypeLike) -> Array:
    """Return int8 codes, float8_e4m3fn numbers or floats in `dtype`, inside a kernel."""
    if codes.dtype == dtype:
        return codes
    if codes.dtype == jnp.uint8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    if codes.dtype == jnp.int8 or jnp.issubdtype(codes.dtype, jnp.floating):
        return codes.astype(jnp.float32).astype(dtype)
    raise NotImplementedError(f"codes of {codes.dtype}: must be int8 or float8_e4m3fn")
