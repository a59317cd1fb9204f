"""Writing some entries of an array in place, in the way that suits each backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def put(store: Shaped[Array, "..."], at: tuple[Any, ...], new: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Return `store.at[at].set(new)`, new entries rounded to its dtype; what is past an axis' end is dropped."""
    new = new.astype(store.dtype)

    def plain(store: Array, new: Array) -> Array:
        return store.at[at].set(new, mode="drop")

    def by_bits(store: Array, new: Array) -> Array:
        # XLA's CPU backend scatters bfloat16 by way of float32, all of the store at once; to copy its bits takes half
        # as long.
        bits = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (store, new))
        return jax.lax.bitcast_convert_type(plain(*bits), store.dtype)

    if store.dtype != jnp.bfloat16:
        return plain(store, new)
    return jax.lax.platform_dependent(store, new, cpu=by_bits, default=plain)


def put_box(
    store: Shaped[Array, "..."], start: tuple[int | Int[Array, ""], ...], new: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """Return `store` with `new` from entry `start` of its first axes, whole along the others; it must lie inside."""
    rest = store.ndim - len(start)

    def box(store: Array, new: Array, *start: Array) -> Array:
        return jax.lax.dynamic_update_slice(store, new, (*start, *(0,) * rest))

    def entries(store: Array, new: Array, *start: Array) -> Array:
        # Each is an update of its own: XLA for TPU then keeps the store's layout, and a loop copies nothing.
        axes = zip(start, new.shape, strict=False)
        at = (first + jnp.arange(n).reshape(-1, *(1,) * (len(start) - 1 - i)) for i, (first, n) in enumerate(axes))
        return store.at[tuple(at)].set(new)

    start = tuple(jnp.asarray(x, jnp.int32) for x in start)
    return jax.lax.platform_dependent(store, new.astype(store.dtype), *start, tpu=entries, default=box)
