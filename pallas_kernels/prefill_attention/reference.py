"""Prefill attention in plain jax, float32, one softmax over all slots: what every backend is compared with."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.calls import Known


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    scale: float,
    position: Int[Known, "B"] | None = None,
    length: Int[Known, "B"] | None = None,
    starts: Int[Known, "B _"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    counts: Int[Known, "B X _"] | None = None,
    lists: Int[Known, "B X _ most"] | None = None,
    sparse_block: tuple[int, int] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    B, T, N, _ = q.shape
    S = k.shape[2]
    seen = visible(jnp.arange(T), B, S, position, length, starts, window, sinks)[:, None]
    if lists is not None:
        chosen = _chosen(jnp.asarray(counts), jnp.asarray(lists), sparse_block, T, S)
        seen = seen & jnp.repeat(chosen, N // chosen.shape[1], axis=1)
    out, lse = masked_attention(q, k, v, k_scale, v_scale, seen, scale=scale, softcap=softcap)
    return (out, lse) if return_lse else out


def masked_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    k_scale: Float[Array, "B K S"] | None,
    v_scale: Float[Array, "B K S"] | None,
    seen: Bool[Array, "B X T S"],
    *,
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Return attention over the slots that each query sees, of every head or of its own, and its log-sum-exp."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    seen = jnp.broadcast_to(seen, (B, N, T, S)).reshape(B, K, N // K, T, S)
    alive = seen.any(axis=(2, 3))[..., None]
    keys = jnp.where(alive, k.astype(jnp.float32), 0)
    values = jnp.where(alive, v.astype(jnp.float32), 0)
    if k_scale is not None:
        keys = keys * jnp.where(alive[..., 0], k_scale.astype(jnp.float32), 0)[..., None]
        values = values * jnp.where(alive[..., 0], v_scale.astype(jnp.float32), 0)[..., None]
    queries = q.astype(jnp.float32).reshape(B, T, K, N // K, H) * scale
    scores = jnp.einsum("btkgh,bksh->bkgts", queries, keys, precision="highest")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen, scores, -jnp.inf)
    peak = scores.max(axis=-1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.where(seen, jnp.exp(scores - peak), 0)
    total = weights.sum(axis=-1, keepdims=True)
    safe = jnp.where(total == 0, 1, total)
    out = jnp.einsum("bkgts,bksh->btkgh", weights / safe, values, precision="highest")
    out = out.reshape(B, T, N, H).astype(q.dtype)
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(safe) + peak)[..., 0]
    return out, lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def visible(
    token: Int[Array, "T"],
    B: int,
    S: int,
    position: Int[Known, "B"] | None,
    length: Int[Known, "B"] | None,
    starts: Int[Known, "B _"] | None,
    window: int | None,
    sinks: int,
) -> Bool[Array, "B T S"]:
    """Return which slots each query, some tokens of a row, sees; block lists apart."""
    slot, token = jnp.arange(S)[None, None], token[None, :, None]
    at = token if position is None else jnp.asarray(position)[:, None, None] + token
    seen = jnp.broadcast_to(slot <= at, (B, token.shape[1], S))
    if length is not None:
        seen &= slot < jnp.asarray(length)[:, None, None]
    if starts is not None:
        bounds = jnp.asarray(starts)[:, None]  # [B, 1, R + 1]
        of_token = (bounds <= token).sum(-1)[:, :, None]
        of_slot = (bounds <= jnp.arange(S)[None, :, None]).sum(-1)[:, None]
        seen &= (of_token == of_slot) & (of_slot > 0) & (of_slot < bounds.shape[-1])
    return seen if window is None else seen & ((slot > at - window) | (slot < sinks))


def _chosen(counts: Array, lists: Array, block: tuple[int, int], T: int, S: int) -> Bool[Array, "B X T S"]:
    """Return which slots the lists let each query see."""
    bq, bk = block
    used = jnp.arange(lists.shape[-1]) < counts[..., None]
    picked = (lists[..., None] == jnp.arange(-(-S // bk))) & used[..., None]
    picked = picked.any(axis=-2)  # [B, X, Tq, Sk]
    return jnp.repeat(jnp.repeat(picked, bq, axis=2)[:, :, :T], bk, axis=3)[..., :S]
