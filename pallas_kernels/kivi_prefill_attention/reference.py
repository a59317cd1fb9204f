"""Attention of many tokens over packed groups in plain jax: they are unpacked, and masked by each query's boundary."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Known
from pallas_kernels.kivi_attention.reference import dequantize
from pallas_kernels.prefill_attention.reference import masked_attention


def kivi_prefill_attention(
    q: Float[Array, "B T N H"],
    k_codes: UInt8[Array, "B K S2 H"],
    v_codes: UInt8[Array, "B K S2 H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    length: Int[Known, "B"],
    *,
    scale: float,
    group: int,
    residual: int,
    position: Int[Known, "B"],
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    keys, values = dequantize(k_codes, v_codes, k_scale, k_offset, v_scale, v_offset, group)
    slot = jnp.arange(keys.shape[2])
    at = (jnp.asarray(position)[:, None] + jnp.arange(q.shape[1]))[..., None]
    seen = slot < jnp.minimum(group * ((at + 1 - residual) // group), jnp.asarray(length)[:, None, None])
    if window is not None:
        seen &= slot > at - window
    out, lse = masked_attention(q, keys, values, None, None, seen[:, None], scale=scale, softcap=softcap)
    return (out, lse) if return_lse else out
