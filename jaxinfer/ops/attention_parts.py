"""Attention over some of a context's slots: with its log-sum-exp it can be merged with that over the others."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops.attention import MASKED, Scaled, Share, by_query_blocks, check_tree
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_attention import kernel_attention
from jaxinfer.ops.online_attention import shares_of_slots
from jaxinfer.ops.token_tree import TokenTree

Part = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]  # attention over some slots, its log-sum-exp: float32


def attention_part(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Scaled,
    v: Float[Array, "B K S H"] | Scaled,
    positions: Int[Array, "B T"],
    first_slot: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tree: TokenTree | None = None,
    implementation: Implementation | None = None,
) -> Part:
    """Return `ops.attention.attention` over S slots, of which slot s holds the key of position `first_slot + s`.

    Queries may be before these slots, or after them. One that sees none of them gets finite numbers, and a log-sum-exp
    that leaves them no weight beside any other.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)

    def pallas(q, k, v, positions, first_slot, tree):
        if tree is not None:
            raise NotImplementedError("a tree over some of the slots: its nodes may be outside of them")
        scales = {}
        if isinstance(k, Scaled):
            (k, scales["k_scale"]), (v, scales["v_scale"]) = k, v
        # To the kernels the slots begin at 0, padding stays below all else, and what is past the end sees all.
        out, lse = kernel_attention(q, k, v, positions - first_slot, return_lse=True, **scales, **options)
        return out.astype(jnp.float32), jnp.maximum(lse, MASKED)

    def xla(q, k, v, positions, first_slot, tree):
        check_tree(q, tree)

        def attend(q: Array, positions: Array, _) -> Part:
            out, lse = as_part(shares_of_slots(q, k, v, positions, tree, first_slot=first_slot, **options))
            return out, jnp.maximum(lse, MASKED)

        return by_query_blocks(attend, q, positions)

    return choose(implementation, pallas, xla, q, k, v, positions, first_slot, tree)


def join(a: Part, b: Part) -> Part:
    """Return attention over two disjoint sets of slots; log-sum-exps are finite."""
    peak = jnp.maximum(a[1], b[1])
    left, right = jnp.exp(a[1] - peak), jnp.exp(b[1] - peak)
    total = left + right
    out = (a[0] * left[..., None] + b[0] * right[..., None]) / total[..., None]
    return out, peak + jnp.log(total)


def as_share(out: Float[Array, "B T N H"], lse: Float[Array, "B T N"], kv_heads: int) -> Share:
    """Return a part as a share, to merge it with others."""
    B, T, N, _ = out.shape
    out, peak = (x.reshape(B, T, kv_heads, N // kv_heads, -1).transpose(0, 2, 3, 1, 4) for x in (out, lse[..., None]))
    return Share(out, jnp.ones_like(peak), peak)


def as_part(found: Share) -> Part:
    """Return a share as attention and its log-sum-exp."""
    B, K, G, T, _ = found.out.shape
    total = jnp.where(found.total == 0, 1, found.total)
    lse = jnp.where(found.total == 0, -jnp.inf, found.peak + jnp.log(total))
    out, lse = (x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, -1) for x in (found.out / total, lse))
    return out, lse[..., 0]
