"""Attention of a few new tokens over old ones that are packed in groups of 4-bit codes (KIVI), in pages.

    paged_kivi_attention(q, codes, key_grids, value_grids, table, length, group=G) -> out [B, T, N, H], or
    (out, lse [B, T, N])

A page holds `page` slots of all key heads, whole groups of them: slot s of row b is slot `s % page` of page
`table[b, s // page]`, and a row's first `length[b]` slots hold something, a whole number of groups. Of a row's table
`[B, M]` only the entries of these are read. Keys and values of a page lie side by side, so that a page is three copies:
codes `[P, 2, K, page / 2, H]`, the scales and offsets of keys `[P, 2, K, page / G, H]` and of values
`[P, 2, K * runs, page]`, each as in `kivi_attention`: `codes[p, 0]` of the keys, `key_grids[p, 0]` the scales.
`position`, window, softcap and lse are those of `kivi_attention`. A group is written once it is complete, which is
not this call's; the tokens that are not packed yet are another one, merged by the lse. (KIVI, 2402.02750;
PagedAttention, 2309.06180.)
"""

from pallas_kernels.paged_kivi_attention.gpu import paged_kivi_attention as gpu
from pallas_kernels.paged_kivi_attention.reference import paged_kivi_attention as reference
from pallas_kernels.paged_kivi_attention.tpu import paged_kivi_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
