"""Tokens that branch: drafts of speculation are nodes of a tree, and a node sees what came before and its ancestors."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxinfer.errors import InputError


class TokenTree(NamedTuple):
    """T new tokens as nodes: node t is in the t-th slot after what is cached, at the position of its depth."""

    ancestors: Bool[Array, "... T T"] | Bool[np.ndarray, "T T"]  # [t, i]: node i is t, or an ancestor of it
    depth: Int[Array, "... T"] | Int[np.ndarray, "T"]  # of the root, node 0, it is 0

    @classmethod
    def of(cls, parents: Sequence[int]) -> "TokenTree":
        """Return the tree in which node i hangs on node parents[i] < i, and node 0 on none (-1).

        Raises:
            InputError: another number stands somewhere.
        """
        check_parents(parents)
        seen = np.eye(len(parents), dtype=bool)
        for node, parent in enumerate(parents):
            if node:
                seen[node] |= seen[parent]
        return cls(seen, (seen.sum(axis=1) - 1).astype(np.int32))


def check_parents(parents: Sequence[int]) -> None:
    """Raise InputError unless the first of `parents` is -1 and every other one an earlier node's number."""
    if not parents or parents[0] != -1 or any(not 0 <= p < i for i, p in enumerate(parents) if i):
        raise InputError(f"parents={tuple(parents)}: must be -1 and then, for each node, the number of an earlier one")


def last_slot(positions: Int[Array, "B T"], tree: TokenTree | None) -> Int[Array, ""]:
    """Return the last slot that any query sees; padding has negative positions."""
    return positions.max() if tree is None else positions[:, 0].max() + positions.shape[1] - 1


def tree_visible(
    positions: Int[Array, "B T"], slots: Int[Array, "b S"], window: int | None, tree: TokenTree
) -> Bool[Array, "B T S"]:
    """Return which slots each node sees: its ancestors' and those before the root's, as far as the window reaches."""
    T = positions.shape[1]
    node = slots - positions[:, :1]  # [B, S]
    at = jnp.clip(node, 0, T - 1)
    ancestors, depth = (jnp.asarray(x) for x in tree)
    if ancestors.ndim == 2:
        among = jnp.moveaxis(ancestors[:, at], 0, 1)  # [B, T, S]
    else:
        among = jnp.take_along_axis(ancestors, jnp.broadcast_to(at[:, None], (len(at), T, at.shape[1])), axis=2)
    among &= (node < T)[:, None]
    seen = jnp.where((node < 0)[:, None], True, among) & (positions >= 0)[:, :, None]
    if window is None:
        return seen
    deep = depth[at] if depth.ndim == 1 else jnp.take_along_axis(depth, at, axis=1)
    held = jnp.where(node < 0, slots, positions[:, :1] + deep)  # the position of the token in a slot
    return seen & (held[:, None] > positions[:, :, None] - window)
