"""Attention of a few new tokens over old ones that are packed in groups of 4-bit codes (KIVI).

    kivi_attention(q, k_codes, v_codes, k_scale, k_offset, v_scale, v_offset, length, group=G) -> out [B, T, N, H], or
    (out, lse [B, T, N])

S = M * G slots in M groups, of which a row's first `length[b]` hold something, a whole number of groups. Codes are
uint8 `[B, K, S / 2, H]`: of the G / 2 rows of a group, row r has token r in its low nibbles and token r + G / 2 in its
high ones. A key is `code * k_scale + k_offset` with a scale for each channel of a group, `[B, K, M, H]`; a value
`code * v_scale + v_offset` with one for each run of channels of a token, `[B, K * runs, S]`. `position` (query t is at
`position[b] + t`), window, softcap and lse are those of `decode_attention`; the tokens that are not packed yet are
another call of that, and the two are merged by their lse. (KIVI, 2402.02750.)
"""

from pallas_kernels.kivi_attention.gpu import kivi_attention as gpu
from pallas_kernels.kivi_attention.reference import kivi_attention as reference
from pallas_kernels.kivi_attention.tpu import kivi_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
