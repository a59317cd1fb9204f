"""Attention over packed groups: the old tokens' part of a softmax that recent ones have a part in too."""

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.groups import Groups, dequantize_groups, packed_before
from jaxinfer.cache.packed_pages import PackedPages
from jaxinfer.ops.attention import by_query_blocks, group_heads, share, visible
from jaxinfer.ops.attention_parts import Part, as_part, as_share
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_attention import DECODE_TOKENS
from jaxinfer.ops.online_attention import SLOT_BLOCK, merge, shares_of_blocks
from pallas_kernels import kivi_attention, kivi_prefill_attention, paged_kivi_attention, targets


def packed_attention(
    q: Float[Array, "B T N H"],
    groups: Groups | PackedPages,
    positions: Int[Array, "B T"],
    *,
    residual: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    consecutive: bool = True,
    implementation: Implementation | None = None,
) -> Part:
    """Return attention over the packed tokens, and its log-sum-exp: a query reads those that are packed for it.

    A row's positions follow on one another where they are `consecutive`, and none is before the first one's; negative
    ones are padding after them. A query that sees nothing gets
    numbers, and a log-sum-exp that gives them no weight.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(residual=residual, scale=scale, window=window, softcap=softcap)

    def xla(q, groups, positions):
        return by_query_blocks(lambda q, p, _: _by_blocks(q, groups, p, **options), q, positions)

    pallas = functools.partial(_by_kernel, consecutive=consecutive, **options)
    return choose(implementation, pallas, xla, q, groups, positions)


def _by_kernel(q, groups, positions, *, consecutive, residual, **options: Any) -> Part:
    T, G = q.shape[1], groups.size
    if groups.bits != 4:
        raise NotImplementedError(f"codes of {groups.bits} bits: must be of 4")
    if not consecutive and (options["window"] is not None or min(DECODE_TOKENS, G) < T):
        raise NotImplementedError(f"{T} queries that don't follow on one another: must be few, and without a window")
    boundary = packed_before(positions, G, residual)
    options |= dict(group=G, position=positions[:, 0], return_lse=True)
    if T > DECODE_TOKENS:
        arrays = _arrays(groups.rows())
        out, lse = targets.kernel(kivi_prefill_attention)(
            q, *arrays, boundary.max(axis=1), residual=residual, **options
        )
        return out.astype(jnp.float32), lse
    # Padding comes last, so the first query's boundary is that of no other one's padding.
    if isinstance(groups, PackedPages):
        arrays = (groups.codes, groups.key_grids, groups.value_grids, groups.table)
        out, lse = targets.kernel(paged_kivi_attention)(q, *arrays, boundary[:, 0], **options)
    else:
        out, lse = targets.kernel(kivi_attention)(q, *_arrays(groups), boundary[:, 0], **options)
    out = out.astype(jnp.float32)
    if T == 1:
        return out, lse
    K = groups.kv_heads
    # One group at most is packed for some of a row's queries and not for its first.
    index = jnp.minimum(boundary[:, 0] // G, groups.count - 1)
    slots = index[:, None] * G + jnp.arange(G)
    seen = visible(positions, slots, options["window"])
    seen &= (slots[:, None] >= boundary[:, :1, None]) & (slots[:, None] < boundary[..., None])
    k, v = dequantize_groups(groups.of_rows(index), q.dtype)
    more = share(group_heads(q, K, options["scale"]), k, v, seen, options["softcap"])
    return as_part(merge(as_share(out, lse, K), more))


def _arrays(groups: Groups) -> tuple[Array, ...]:
    """Return the arrays of groups in the order of the kernels."""
    return groups.k_codes, groups.v_codes, groups.k_scale, groups.k_offset, groups.v_scale, groups.v_offset


def _by_blocks(q, groups, positions, *, residual, scale, window, softcap) -> Part:
    """Unpack a block of groups at a time."""
    G, M, near = groups.size, groups.count, groups.together
    size = min(M, near * max(1, SLOT_BLOCK // (near * G)))
    grouped = group_heads(q, groups.kv_heads, scale)
    boundary = packed_before(positions, G, residual)

    def read(i: Array):
        start = jnp.minimum(i * size, M - size)
        slots = start * G + jnp.arange(size * G)[None]
        seen = visible(positions, slots, window) & (slots[:, None] < boundary[..., None])
        # The last block may reach back over groups that the one before it has counted.
        return *dequantize_groups(groups.cut(start, size), grouped.dtype), seen & (slots >= i * size * G)

    last = -(-boundary.max() // (size * G))
    first = jnp.int32(0)
    if window is not None:
        earliest = jnp.where(positions < 0, M * G, positions).min() - window + 1
        first = jnp.maximum(earliest, 0) // (size * G)
    return as_part(shares_of_blocks(grouped, read, first, last, softcap))
