"""The one contraction that every linear layer uses."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum(eq: str, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `jnp.einsum(eq, x, kernel)` accumulated in float32 and rounded once to x's dtype.

    `x` keeps its leading axes B and T; `kernel` has none of them.
    """

    def contract(x: Array, kernel: Array) -> Array:
        return jnp.einsum(eq, x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)

    def contract_two_rows(x: Array, kernel: Array) -> Array:
        # XLA's CPU backend runs one row of bfloat16 through a scalar loop, ten times slower than two rows.
        return contract(jnp.concatenate([x, x], axis=1), kernel)[:, :1]

    one_row = math.prod(x.shape[:2]) == 1 and x.dtype == jnp.bfloat16
    if not one_row:
        return contract(x, kernel)
    return jax.lax.platform_dependent(x, kernel, cpu=contract_two_rows, default=contract)
