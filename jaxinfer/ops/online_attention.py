"""Softmax attention over a context that is read in blocks: each block's share is made and merged before the next.

Nothing larger than a block is ever unpacked: codes stay codes in memory (online softmax, 1805.02867; 2112.05682).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.ops.attention import (
    MASKED,
    Scaled,
    Share,
    by_query_blocks,
    check_tree,
    group_heads,
    share,
    ungroup_heads,
    visible,
)
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_attention import kernel_attention
from jaxinfer.ops.token_tree import TokenTree, last_slot

SLOT_BLOCK = 512  # slots unpacked at a time
Block = tuple[Array | Scaled, Array | Scaled, Bool[Array, "B T S"]]  # keys, values, which query sees which slot


def online_attention(
    q: Float[Array, "B T N H"],
    k: Scaled,
    v: Scaled,
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tree: TokenTree | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Return what `ops.attention.attention` returns for `k.values * k.scale` and `v.values * v.scale`.

    A score is multiplied by its key's scale after the product, a weight by its value's before it, so that the codes
    themselves go into the products.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)

    def pallas(q, k, v, positions, tree):
        return kernel_attention(
            q, k.values, v.values, positions, k_scale=k.scale, v_scale=v.scale, tree=tree, **options
        )

    return choose(implementation, pallas, functools.partial(_by_blocks, **options), q, k, v, positions, tree)


def _by_blocks(q, k, v, positions, tree, **options):
    check_tree(q, tree)

    def attend(q: Array, positions: Array, _) -> Array:
        return ungroup_heads(finite(shares_of_slots(q, k, v, positions, tree, **options)), q)

    return by_query_blocks(attend, q, positions)


def shares_of_slots(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Scaled,
    v: Float[Array, "B K S H"] | Scaled,
    positions: Int[Array, "B T"],
    tree: TokenTree | None,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    first_slot: Int[Array, ""] | None = None,
) -> Share:
    """Return what the slots contribute to the attention of few queries; slot 0 is at position `first_slot`, or 0.

    Nothing, a total of 0, where no query sees a slot of the blocks that are read.
    """
    K, S = (k.values if isinstance(k, Scaled) else k).shape[1:3]
    size = min(S, SLOT_BLOCK)

    def read(i: Array) -> Block:
        start = jnp.minimum(i * size, S - size)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=2)
        slots = start + jnp.arange(size)[None]
        at = slots if first_slot is None else first_slot + slots
        # The last block may reach back over slots that the one before it has counted.
        seen = visible(positions, at, window, tree) & (slots >= i * size)
        return jax.tree.map(cut, k), jax.tree.map(cut, v), seen

    grouped, there, reach = group_heads(q, K, scale), positions, window
    if first_slot is not None:
        there = positions - first_slot
        reach = window if tree is None else None  # a node before the first slot has its own after it
    first, last = block_range(there, size, -(-S // size), reach, tree)
    return shares_of_blocks(grouped, read, first, last, softcap)


def block_range(
    positions: Int[Array, "B T"], size: int, count: int, window: int | None, tree: TokenTree | None = None
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Return the first of the `count` blocks of `size` slots that any query sees, and the one after the last."""
    last = jnp.minimum((last_slot(positions, tree) + size) // size, count)
    if window is None:
        return jnp.int32(0), last
    earliest = jnp.where(positions < 0, count * size, positions).min() - window + 1
    return jnp.maximum(earliest, 0) // size, last


def shares_of_blocks(
    q: Float[Array, "B K GT H"],
    read: Callable[[Int[Array, ""]], Block],
    first: Int[Array, ""],
    last: Int[Array, ""],
    softcap: float | None,
) -> Share:
    """Return what the blocks `read(first) .. read(last - 1)` contribute together; nothing where there is none."""
    k, v, seen = jax.eval_shape(read, first)
    shapes = jax.eval_shape(functools.partial(share, softcap=softcap), q, k, v, seen)
    nothing = Share(jnp.zeros_like(shapes.out), jnp.zeros_like(shapes.total), jnp.full_like(shapes.peak, MASKED))
    return jax.lax.fori_loop(first, last, lambda i, so_far: merge(so_far, share(q, *read(i), softcap)), nothing)


def merge(a: Share, b: Share) -> Share:
    """Return what two disjoint sets of slots contribute together."""
    peak = jnp.maximum(a.peak, b.peak)
    left, right = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return Share(a.out * left + b.out * right, a.total * left + b.total * right, peak)


def finite(shares: Share) -> Share:
    """Return shares whose total is not 0: where no block was read, for padding alone, attention is then 0."""
    return shares._replace(total=jnp.where(shares.total == 0, 1, shares.total))
