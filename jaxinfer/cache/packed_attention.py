"""Attention over packed groups: what the old tokens contribute to a softmax that recent ones have a part in too."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.groups import Groups, dequantize_groups
from jaxinfer.ops.attention import Share, group_heads, share, visible
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.online_attention import SLOT_BLOCK, merge, shares_of_blocks
from jaxinfer.ops.tpu_attention import DECODE_TOKENS
from pallas_kernels import kivi_attention


def packed_share(
    q: Float[Array, "B T N H"],
    groups: Groups,
    positions: Int[Array, "B T"],
    boundary: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    consecutive: bool = True,
    implementation: Implementation | None = None,
) -> Share:
    """Return the share of the packed tokens: query t of row b reads those before boundary[b, t], whole groups of them.

    A row's queries follow on one another where they are `consecutive`; no boundary is before the first one's.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)
    pallas = functools.partial(_by_kernel, consecutive=consecutive, **options)
    xla = functools.partial(_by_blocks, **options)
    return choose(implementation, pallas, xla, q, groups, positions, boundary)


def _by_kernel(q, groups, positions, boundary, *, consecutive, scale, window, softcap):
    T, G = q.shape[1], groups.size
    if groups.bits != 4 or min(DECODE_TOKENS, G) < T:
        raise NotImplementedError(f"{T} queries over {groups.bits}-bit codes: must be few, over codes of 4 bits")
    if not consecutive and window is not None:
        raise NotImplementedError("a window and queries that don't follow on one another")
    # Padding comes last, so the first query's boundary is that of no other one's padding.
    out, lse = kivi_attention.tpu(
        q, groups.k_codes, groups.v_codes, groups.k_scale, groups.k_offset, groups.v_scale, groups.v_offset,
        boundary[:, 0], scale=scale, group=G, position=positions[:, 0], window=window, softcap=softcap, return_lse=True,
    )  # fmt: skip
    B, _, N, _ = q.shape
    K = groups.k_scale.shape[1]

    def grouped(x):
        return x.astype(jnp.float32).reshape(B, T, K, N // K, -1).transpose(0, 2, 3, 1, 4)

    found = Share(grouped(out), jnp.ones((B, K, N // K, T, 1), jnp.float32), grouped(lse))
    if T == 1:
        return found
    # One group at most is packed for some of a row's queries and not for its first.
    index = jnp.minimum(boundary[:, 0] // G, groups.count - 1)
    slots = index[:, None] * G + jnp.arange(G)
    seen = visible(positions, slots, window)
    seen &= (slots[:, None] >= boundary[:, :1, None]) & (slots[:, None] < boundary[..., None])
    k, v = dequantize_groups(groups.of_rows(index), q.dtype)
    return merge(found, share(group_heads(q, K, scale), k, v, seen, softcap))


def _by_blocks(q, groups, positions, boundary, *, scale, window, softcap):
    """Unpack a block of groups at a time."""
    grouped = group_heads(q, groups.k_scale.shape[1], scale)
    G, M = groups.size, groups.count
    size = min(M, max(1, SLOT_BLOCK // G))

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
    return shares_of_blocks(grouped, read, first, last, softcap)
