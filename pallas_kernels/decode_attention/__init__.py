"""Attention of a few new tokens over a cache: every row reads the blocks of its own live slots, and no others.

    decode_attention(q, k, v, length) -> out [B, T, N, H], or (out, lse [B, T, N])

q `[B, T, N, H]` are T tokens a row, k and v `[B, K, S, H]` the cache, which holds them already: query t is at position
`position[b] + t`, by default `length[b] - T + t`, and slot s holds position s. A query sees slot s where

    start[b] <= s < length[b],  s <= its position,  and s > its position - window or s < sinks.

With `ring`, on GPUs alone, slot s holds the last position below length[b] that is s mod S, or nothing where there is
none: a cache of the newest S tokens, whose positions the rule is about in place of slots.

With `tree` `[T, T]` or `[B, T, T]`, bool, the last T slots before `length[b]` are nodes of a tree: query t sees slot
`length[b] - T + i` where `tree[t, i]`, and all slots before those. Codes of a quantized cache, int8 or float8, have
`k_scale` and `v_scale` `[B, K, S]`, which multiply scores and weights, not keys and values. `lse` is the log of the sum
of the exponentials of a query's scores, -inf where it sees nothing; its output is then 0. (FlashAttention, 2205.14135;
Flash-Decoding; tree masks: 2305.09781.)
"""

from pallas_kernels.decode_attention.gpu import decode_attention as gpu
from pallas_kernels.decode_attention.reference import decode_attention as reference
from pallas_kernels.decode_attention.tpu import decode_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
