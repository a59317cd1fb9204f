"""Attention of a few new tokens over a cache in pages, which the same call appends them to, in place.

    paged_decode_attention(q, k_pages, v_pages, table, length) -> out [B, T, N, H], and what is asked for after it

Pages `[P, K, page, H]` hold `page` slots of all key heads: slot s of row b is slot `s % page` of page
`table[b, s // page]`. Of a row's table `[B, M]` only the entries of its `length[b]` live slots are read. The words
start, window, sinks, softcap, tree, k_scale and v_scale (`[P, K, page]` here) mean what they mean in
`decode_attention`, with query t at position `length[b] - T + t`.

With `new`, the T tokens' own keys and values, `{"k": [B, T, K, H], "v": ...}`, in the pages' dtype (with scales also
`"k_scale"` and `"v_scale"` `[B, T, K]`), they are written at their positions first: `length` counts them. A row of
length 0 writes nothing. The pages that result are the same buffers, in a tuple `(k_pages, v_pages, ...)` after the
output. (PagedAttention, 2309.06180.)
"""

from pallas_kernels.paged_decode_attention.gpu import paged_decode_attention as gpu
from pallas_kernels.paged_decode_attention.reference import paged_decode_attention as reference
from pallas_kernels.paged_decode_attention.tpu import paged_decode_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
