"""Where new tokens go: into the slots of their own positions, row by row."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from jaxinfer.ops.scatter import put

Tree = TypeVar("Tree")
FEW = 16  # new entries of a row up to which they are written one by one, and not in a pass over all slots


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
    if B == 1 and T <= S:
        # Some slots of one row: an in-place slice update, where a scatter costs a loop.
        first = jnp.minimum(start[0], S - T)
        old = jax.lax.dynamic_slice_in_dim(store, first, T, axis=2)
        changed = pick(old, new, first + jnp.arange(T)[None] - start[:, None], counts)
        return jax.lax.dynamic_update_slice_in_dim(store, changed, first, axis=2)
    if T <= FEW:
        # A head's slot is an update of its own: XLA for TPU then keeps the store's layout, and a loop copies nothing.
        slots = jnp.where(jnp.arange(T) < counts[:, None], start[:, None] + jnp.arange(T), S)  # S: the write is dropped
        rows, heads = jnp.arange(B)[:, None, None], jnp.arange(store.shape[1])[:, None]
        return put(store, (rows, heads, slots[:, None]), new)
    # Many entries: every slot picks its new one or keeps its own. One pass, no scatter, any start.
    return pick(store, new, jnp.arange(S)[None] - start[:, None], counts)


def move(
    store: Shaped[Array, "B K S *rest"], start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]
) -> Shaped[Array, "B K S *rest"]:
    """Return `store` with what was nodes[b, i] slots after start[b] i slots after it, for i < counts[b]."""
    at = jnp.clip(start[:, None] + nodes, 0, store.shape[2] - 1)
    new = jnp.take_along_axis(store, at.reshape(len(at), 1, -1, *(1,) * (store.ndim - 3)), axis=2)
    return write(store, new, start, counts)


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


def ring_positions(end: Int[Array, "B"], size: int) -> Int[Array, "B R"]:
    """Return the position in each slot of a ring that position end[b] - 1 was the last to enter; negative: none."""
    last = end[:, None] - 1
    return last - (last - jnp.arange(size)) % size


def take_rows(cache: Tree, rows: Int[Array, "n"]) -> Tree:
    """Return a tree of arrays `[B, ...]` with row rows[i] as its row i."""
    return jax.tree.map(lambda store: store[rows], cache)
