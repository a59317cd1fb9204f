"""What decode attention is timed beside on a GPU."""

import jax
import jax.numpy as jnp


def cudnn(q, k, v, length, *, scale, k_scale=None, blocks=None, **options):
    """Return cuDNN's attention, which takes a cache `[B, S, K, H]`: what it holds does not change the time."""
    del blocks
    B, K, S, H = k.shape
    if k_scale is not None or set(options) - {"v_scale"} or q.shape[1] > 1:
        raise NotImplementedError("one token, a cache of bfloat16, and no words but scale")
    keys, values = (x.reshape(B, S, K, H) for x in (k, v))
    ones, lengths = jnp.ones(B, jnp.int32), jnp.asarray(length, jnp.int32)
    return jax.nn.dot_product_attention(
        q, keys, values, scale=scale, query_seq_lengths=ones, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def xla(q, k, v, length, *, scale, k_scale=None, v_scale=None, blocks=None, **options):
    """Return the formula in plain jax, in the dtype of q, over all slots."""
    del blocks
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    if options:
        raise NotImplementedError(f"{', '.join(options)}: no words but scale")
    queries = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("btkgh,bksh->bkgts", queries, k.astype(q.dtype), preferred_element_type=jnp.float32) * scale
    if k_scale is not None:
        scores = scores * k_scale[:, :, None, None].astype(jnp.float32)
    last = jnp.asarray(length)[:, None] - T + jnp.arange(T)
    scores = jnp.where((jnp.arange(S) <= last[..., None])[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores)
    if v_scale is not None:
        weights = weights * v_scale[:, :, None, None].astype(jnp.float32)
    return jnp.einsum("bkgts,bksh->btkgh", weights.astype(q.dtype), v.astype(q.dtype)).reshape(q.shape)


PEERS = {"cudnn": cudnn, "xla": xla}
