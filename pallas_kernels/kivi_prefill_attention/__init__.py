"""Attention of many new tokens over old ones that are packed in groups of 4-bit codes (KIVI).

    kivi_prefill_attention(q, k_codes, v_codes, k_scale, k_offset, v_scale, v_offset, length, group=G, residual=R)
        -> out [B, T, N, H], or (out, lse [B, T, N])

Codes and their scales and offsets are those of `kivi_attention`; a row's first `length[b]` slots hold something, a
whole number of groups. Query t is at `p = position[b] + t`, and sees slot s where

    s < length[b],  s < G * max(0, floor((p + 1 - R) / G)),  and s > p - window:

the groups that are packed for it, which depends on its position alone. Scale, softcap and lse are those of
`prefill_attention`; the newer tokens are another call, and the two are merged by their lse. (KIVI, 2402.02750.)
"""

from pallas_kernels.kivi_prefill_attention.gpu import kivi_prefill_attention as gpu
from pallas_kernels.kivi_prefill_attention.reference import kivi_prefill_attention as reference
from pallas_kernels.kivi_prefill_attention.tpu import kivi_prefill_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
