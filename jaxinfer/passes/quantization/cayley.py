"""Gradient descent among orthogonal matrices."""

import jax.numpy as jnp
from jaxtyping import Array, Float

_TINY = 1e-30


def cayley_step(
    rotation: Float[Array, "*L D D"], gradient: Float[Array, "*L D D"], rate: Float[Array, ""]
) -> Float[Array, "*L D D"]:
    """Return an orthogonal R after one step downhill: `(1 + A/2)^-1 (1 - A/2) R`, with A skew-symmetric.

    A is `G R^T - R G^T` scaled to the Frobenius norm `rate`, for the loss's gradient G; over a stack of matrices to
    one norm together. A zero gradient changes nothing (2002.01113).
    """
    product = gradient @ jnp.swapaxes(rotation, -1, -2)
    a = product - jnp.swapaxes(product, -1, -2)
    half = a * (0.5 * rate / jnp.maximum(jnp.linalg.norm(a.reshape(-1)), _TINY))
    one = jnp.eye(rotation.shape[-1], dtype=rotation.dtype)
    return jnp.linalg.solve(one + half, (one - half) @ rotation)
