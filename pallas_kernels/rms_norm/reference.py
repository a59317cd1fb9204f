"""The norm in plain jax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*M D"], scale: Float[Array, "D"], *, eps: float, add: Float[Array, "*M D"] | None = None
) -> Float[Array, "*M D"] | tuple[Float[Array, "*M D"], Float[Array, "*M D"]]:
    """Return what the contract of this folder says."""
    total = x if add is None else x + add
    wide = total.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    y = (wide * factor * scale.astype(jnp.float32)).astype(x.dtype)
    return y if add is None else (total, y)
