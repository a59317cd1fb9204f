"""Softmax attention of query tokens against cache slots, masked by absolute positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30  # finite, so that padding, which sees nothing, gives numbers and not NaN
_QUERY_BLOCK = 256  # query tokens scored together in a prefill: bounds the score matrix to [N, 256, live slots]
_SMALLEST_READ = 128  # slots; below it a smaller read saves nothing


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return `softmax(softcap(scale * q k^T) + mask) v`, where slot s holds the key of position s.

    A query at position p sees positions p - window + 1 .. p. A negative position marks padding: its
    output is finite and means nothing. Slots past the last query position are never used, whatever they hold,
    and at most the next power of two of the live slots is read.
    """
    T = q.shape[1]
    if T <= _QUERY_BLOCK:
        return _attend_block(q, k, v, positions, scale, window, softcap)
    blocks = -(-T // _QUERY_BLOCK)
    pad = blocks * _QUERY_BLOCK - T
    q_blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_blocks = jnp.stack(jnp.split(q_blocks, blocks, axis=1))
    p_blocks = jnp.stack(jnp.split(jnp.pad(positions, ((0, 0), (0, pad)), constant_values=-1), blocks, axis=1))
    out = jax.lax.map(lambda qp: _attend_block(qp[0], k, v, qp[1], scale, window, softcap), (q_blocks, p_blocks))
    return jnp.concatenate(list(out), axis=1)[:, :T]


def _attend_block(q, k, v, positions, scale, window, softcap):
    """Attend with the smallest read that covers every position a query of this block sees."""
    S, T = k.shape[2], q.shape[1]
    last = positions.max()
    first = jnp.int32(0)
    sizes = _read_sizes(S)
    if window is not None:
        seen = jnp.where(positions < 0, S, positions).min() - window + 1
        first = jnp.clip(seen, 0, S - 1)
        if q.shape[0] == 1:  # the rows of a ragged batch may be far apart: any span is possible
            sizes = [s for s in sizes if s < window + T] + [s for s in sizes if s >= window + T][:1]

    def read(size: int):
        def attend(q, k, v, positions, first):
            if window is None:
                start = jnp.int32(0)
                k, v = k[:, :, :size], v[:, :, :size]
            else:
                start = jnp.minimum(first, S - size)
                k = jax.lax.dynamic_slice_in_dim(k, start, size, axis=2)
                v = jax.lax.dynamic_slice_in_dim(v, start, size, axis=2)
            return _softmax_attention(q, k, v, positions, start + jnp.arange(size), scale, window, softcap)

        return attend

    if len(sizes) == 1:
        return read(sizes[0])(q, k, v, positions, first)
    in_sight = last + 1 - first
    index = sum((in_sight > size).astype(jnp.int32) for size in sizes[:-1])  # the first size that covers them
    return jax.lax.switch(index, [read(s) for s in sizes], q, k, v, positions, first)


def _read_sizes(slots: int) -> list[int]:
    sizes, size = [], _SMALLEST_READ
    while size < slots:
        sizes.append(size)
        size *= 2
    return [*sizes, slots]


def _softmax_attention(q, k, v, positions, slots, scale, window, softcap):
    B, T, N, H = q.shape
    K = k.shape[1]
    G = N // K
    grouped = (q * scale).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    scores = jnp.einsum("bkgh,bksh->bkgs", grouped, k, preferred_element_type=jnp.float32).reshape(B, K, G, T, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    p, s = positions[:, :, None], slots[None, None, :]
    visible = s <= p
    if window is not None:
        visible &= s > p - window
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))  # exactly 0 where masked
    total = weights.sum(axis=-1, keepdims=True)
    # A slot that no query sees may hold anything, NaN included, and 0 * NaN is NaN.
    used = slots[None, :] <= positions.max(axis=1, keepdims=True)
    v = jnp.where(used[:, None, :, None], v, 0)
    weights = weights.astype(v.dtype).reshape(B, K, G * T, -1)
    out = jnp.einsum("bkgs,bksh->bkgh", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(B, K, G, T, H) / total
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q.dtype)
