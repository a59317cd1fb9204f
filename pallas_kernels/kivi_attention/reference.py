"""Attention over packed groups in plain jax: they are unpacked, and `decode_attention` does the rest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Known
from pallas_kernels.decode_attention.reference import decode_attention


def kivi_attention(
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
    position: Int[Known, "B"],
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    keys, values = dequantize(k_codes, v_codes, k_scale, k_offset, v_scale, v_offset, group)
    return decode_attention(
        q, keys, values, length, scale=scale, position=position, window=window, softcap=softcap, return_lse=return_lse
    )


def dequantize(
    k_codes: UInt8[Array, "B K S2 H"],
    v_codes: UInt8[Array, "B K S2 H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    group: int,
) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Return the keys and values of all tokens in float32."""
    B, K, _, H = k_codes.shape
    S = v_scale.shape[2]
    runs = v_scale.shape[1] // K

    def per_token(x):
        return x.astype(jnp.float32).repeat(group, axis=2)

    def per_channel(x):
        x = x.astype(jnp.float32).reshape(B, K, runs, S).transpose(0, 1, 3, 2)
        return x.repeat(H // runs, axis=3)

    keys = unpack(k_codes, group) * per_token(k_scale) + per_token(k_offset)
    return keys, unpack(v_codes, group) * per_channel(v_scale) + per_channel(v_offset)


def unpack(codes: UInt8[Array, "B K S2 H"], group: int) -> Float[Array, "B K S H"]:
    """Return the codes of all tokens, 0..15, as float32."""
    B, K, half, H = codes.shape
    grouped = codes.reshape(B, K, -1, group // 2, H)
    both = jnp.concatenate([grouped & 15, grouped >> 4], axis=3)
    return both.reshape(B, K, 2 * half, H).astype(jnp.float32)
