"""The one contraction that every linear layer uses."""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def einsum(eq: str, x: Float[Array, "..."], kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `jnp.einsum(eq, x, kernel)` accumulated in float32 and rounded once to x's dtype.

    `eq` is `"bt" + in letters, kernel letters -> "bt" + out letters`, where the kernel is stored inputs first
    (`"btd,dnh->btnh"`) or outputs first (`"btd,vd->btv"`).

    Raises:
        ValueError: `eq` is not of that form.
    """
    inputs_first = _inputs_first(eq)
    inner = math.prod(x.shape[2:])
    out_shape = kernel.shape[x.ndim - 2 :] if inputs_first else kernel.shape[: kernel.ndim - (x.ndim - 2)]
    # One plain matrix product: with several contracted axes XLA's CPU backend copies the whole kernel first.
    rows = x.reshape(-1, inner)
    matrix = kernel.reshape(inner, -1) if inputs_first else kernel.reshape(-1, inner)
    contract = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (0 if inputs_first else 1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )

    def contract_two_rows(rows: Array, matrix: Array) -> Array:
        # XLA's CPU backend runs one row of bfloat16 through a scalar loop, ten times slower than two rows.
        return contract(jnp.concatenate([rows, rows]), matrix)[:1]

    if rows.shape[0] == 1 and x.dtype == jnp.bfloat16:
        y = jax.lax.platform_dependent(rows, matrix, cpu=contract_two_rows, default=contract)
    else:
        y = contract(rows, matrix)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


@functools.cache
def _inputs_first(eq: str) -> bool:
    parts = re.fullmatch(r"(\w\w)(\w+),(\w+)->\1(\w+)", eq)
    if parts:
        _, inner, kernel, outer = parts.groups()
        if kernel in (inner + outer, outer + inner) and not set(inner) & set(outer):
            return kernel == inner + outer
    raise ValueError(f"eq={eq!r}: must be 'bt<in>,<in><out>->bt<out>' or 'bt<in>,<out><in>->bt<out>'")
