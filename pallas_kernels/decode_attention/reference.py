"""Decode attention in plain jax, float32, one softmax over all slots: what every backend is compared with."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.calls import Known


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    length: Int[Known, "B"],
    *,
    scale: float,
    start: Int[Known, "B"] | None = None,
    position: Int[Known, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Known, "... T T"] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
    ring: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    length = jnp.asarray(length)
    start = jnp.zeros(B, jnp.int32) if start is None else jnp.asarray(start)
    position = length - T if position is None else jnp.asarray(position)
    held = jnp.arange(S)[None]
    if ring:
        held = length[:, None] - 1 - (length[:, None] - 1 - held) % S
        start = jnp.maximum(start, 0)
    seen = visible(T, held, start, position, length, window, sinks)
    if tree is not None:
        node = jnp.arange(S)[None] - (length - T)[:, None]  # [B, S]
        tree = jnp.broadcast_to(jnp.asarray(tree), (B, T, T))
        allowed = jnp.take_along_axis(tree, jnp.clip(node, 0, T - 1)[:, None].repeat(T, 1), axis=2)
        depth = tree.sum(-1) - 1
        slot, at = jnp.arange(S)[None, None], (length - T)[:, None, None] + depth[:, :, None]
        seen = jnp.where((node >= 0)[:, None], allowed & (node < T)[:, None], slot >= start[:, None, None])
        seen &= True if window is None else (slot > at - window) | (slot < sinks)
    alive = seen.any(axis=1)[:, None, :, None]
    keys = jnp.where(alive, k.astype(jnp.float32), 0)
    values = jnp.where(alive, v.astype(jnp.float32), 0)
    if k_scale is not None:
        keys = keys * jnp.where(alive[..., 0], k_scale.astype(jnp.float32), 0)[..., None]
        values = values * jnp.where(alive[..., 0], v_scale.astype(jnp.float32), 0)[..., None]
    queries = q.astype(jnp.float32).reshape(B, T, K, N // K, H) * scale
    scores = jnp.einsum("btkgh,bksh->btkgs", queries, keys, precision="highest")
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, :, None, None], scores, -jnp.inf)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.where(seen[:, :, None, None], jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum("btkgs,bksh->btkgh", weights, values, precision="highest") / jnp.where(total == 0, 1, total)
    out = out.reshape(B, T, N, H).astype(q.dtype)
    if not return_lse:
        return out
    lse = jnp.where(total == 0, -jnp.inf, jnp.log(jnp.where(total == 0, 1, total)) + jnp.where(total == 0, 0, peak))
    return out, lse[..., 0].reshape(B, T, N)


def visible(
    T: int,
    held: Int[Array, "b S"],
    start: Int[Array, "B"],
    position: Int[Known, "B"],
    length: Int[Known, "B"],
    window: int | None,
    sinks: int,
) -> Bool[Array, "B T S"]:
    """Return which slots each query sees, by the positions that they hold, trees apart."""
    slot, at = held[:, None], position[:, None, None] + jnp.arange(T)[None, :, None]
    seen = (slot >= start[:, None, None]) & (slot < length[:, None, None]) & (slot <= at)
    return seen if window is None else seen & ((slot > at - window) | (slot < sinks))
