"""Attention over the recent tokens, which a ring has as they are, and with it that over the packed ones before them."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.groups import packed_before
from jaxinfer.cache.ring import Ring
from jaxinfer.ops.attention import MASKED, by_query_blocks, group_heads, ungroup_heads, visible
from jaxinfer.ops.attention_parts import Part, as_share, join
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.online_attention import merge
from jaxinfer.ops.token_tree import TokenTree
from pallas_kernels import decode_attention, targets


def recent_attention(
    q: Float[Array, "B T N H"],
    recent: Ring,
    positions: Int[Array, "B T"],
    old: Part,
    *,
    group: int,
    residual: int,
    window: int | None,
    tree: TokenTree | None = None,
    implementation: Implementation | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Return attention over all tokens, of which `old` is the part of the packed ones; `options`: scale, softcap.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """

    def pallas(q: Array, recent: Ring, positions: Array, *old: Array) -> Array:
        if q.shape[1] > 1 or tree is not None:
            raise NotImplementedError(f"{q.shape[1]} queries: must be one, or each may have packed tokens of its own")
        if recent.chunk is not None:
            raise NotImplementedError("many new tokens: must be in the ring, or their queries need them apart")
        position = positions[:, 0]
        out, lse = targets.kernel(decode_attention)(
            q, recent.k, recent.v, position + 1, start=packed_before(position, group, residual), window=window,
            ring=True, return_lse=True, **options,
        )  # fmt: skip
        found, _ = join(old, (out.astype(jnp.float32), jnp.maximum(lse, MASKED)))
        return found.astype(q.dtype)

    def xla(q: Array, recent: Ring, positions: Array, *old: Array) -> Array:
        held, heads = recent.held(positions), recent.k.shape[1]

        def attend(q: Array, positions: Array, first: Array, *old: Array) -> Array:
            boundary = packed_before(positions, group, residual)

            def sees(slots: Array) -> Array:
                return visible(positions, slots, window, tree) & (slots[:, None] >= boundary[..., None])

            grouped, reach = group_heads(q, heads, options["scale"]), residual + group
            found = recent.share(grouped, held, first, reach, sees, options["softcap"])
            return ungroup_heads(merge(found, as_share(*old, heads)), q)

        return by_query_blocks(attend, q, positions, *old)

    return choose(implementation, pallas, xla, q, recent, positions, *old)
