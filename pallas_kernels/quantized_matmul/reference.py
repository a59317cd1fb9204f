"""Quantized product in plain jax, float32, the weight written out: what every backend is compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

FOUR_BIT = ("int4", "uint4")
QTYPES = ("int8", "float8_e4m3fn", *FOUR_BIT)


def quantized_matmul(
    x: Float[Array, "M I"],
    values: Array,
    scale: Float[Array, "G O"],
    *,
    qtype: str,
    offset: Float[Array, "G O"] | None = None,
    activations: str | None = None,
) -> Float[Array, "M O"]:
    """Return what the contract of this folder says, in x's dtype."""
    weight = dequantize(values, scale, offset, qtype)
    taken = x.astype(jnp.float32)
    if activations == "int8":
        groups = taken.reshape(x.shape[0], scale.shape[0], -1)
        peak = jnp.abs(groups).max(axis=-1, keepdims=True)
        step = jnp.where(peak > 0, peak / 127.0, 1.0)
        taken = (jnp.round(groups / step) * step).reshape(x.shape)
    return jnp.einsum("mi,oi->mo", taken, weight, precision="highest").astype(x.dtype)


def dequantize(
    values: Array, scale: Float[Array, "G O"], offset: Float[Array, "G O"] | None, qtype: str
) -> Float[Array, "O I"]:
    """Return the weight, float32."""
    weight = codes(values, qtype).astype(jnp.float32)
    groups = weight.reshape(weight.shape[0], scale.shape[0], -1) * scale.T.astype(jnp.float32)[..., None]
    if offset is not None:
        groups = groups + offset.T.astype(jnp.float32)[..., None]
    return groups.reshape(weight.shape)


def codes(values: Array, qtype: str) -> Integer[Array, "O I"] | Float[Array, "O I"]:
    """Return one code for each input of each output."""
    if qtype == "float8_e4m3fn" and values.dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    if qtype not in FOUR_BIT:
        return values
    runs = values.reshape(values.shape[0], -1, 16)
    nibbles = jnp.concatenate([runs & 15, runs >> 4], axis=-1).reshape(values.shape[0], -1).astype(jnp.int8)
    return (nibbles ^ 8) - 8 if qtype == "int4" else nibbles
