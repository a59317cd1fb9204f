"""Where new tokens go: into the slots of their own positions, row by row."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def write(
    store: Shaped[Array, "B K S *rest"],
    new: Shaped[Array, "B K T *rest"],
    start: Int[Array, "B"],
    counts: Int[Array, "B"],
) -> Shaped[Array, "B K S *rest"]:
    """Return `store` with each row's first counts[b] new entries at its slots from start[b].

    What would pass the last slot is dropped; the new entries are rounded to the store's dtype.
    """
    B, _, S = store.shape[:3]
    T = new.shape[2]
    new = new.astype(store.dtype)
    if T == 1 and B == 1:
        # One slot of one row: an in-place slice update, where a scatter costs a loop.
        slot = jnp.minimum(start[0], S - 1)
        old = jax.lax.dynamic_slice_in_dim(store, slot, 1, axis=2)
        fits = (counts[0] > 0) & (start[0] < S)
        return jax.lax.dynamic_update_slice_in_dim(store, jnp.where(fits, new, old), slot, axis=2)
    if T == 1:
        slots = jnp.where(counts > 0, start, S)  # S is out of range, so the write is dropped
        return store.at[jnp.arange(B), :, slots].set(new[:, :, 0], mode="drop")
    # Many entries: every slot picks its new one or keeps its own. One pass, no scatter, any start.
    return pick(store, new, jnp.arange(S)[None] - start[:, None], counts)


def pick(
    store: Shaped[Array, "B K S *rest"],
    new: Shaped[Array, "B K T *rest"],
    offset: Int[Array, "B S"],
    counts: Int[Array, "B"],
) -> Shaped[Array, "B K S *rest"]:
    """Return `store` with `new[:, :, offset]` in every slot whose offset is in 0 .. counts[b] - 1."""
    taken = (offset >= 0) & (offset < counts[:, None])
    rest = (1,) * (store.ndim - 3)
    at = jnp.clip(offset, 0, new.shape[2] - 1).reshape(store.shape[0], 1, store.shape[2], *rest)
    picked = jnp.take_along_axis(new.astype(store.dtype), at, axis=2)
    return jnp.where(taken.reshape(at.shape), picked, store)
