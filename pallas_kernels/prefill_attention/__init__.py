"""Attention of many new tokens over a cache: every block of queries reads the blocks of slots that it sees, no others.

    prefill_attention(q, k, v) -> out [B, T, N, H], or (out, lse [B, T, N])

q `[B, T, N, H]` are T tokens a row, k and v `[B, K, S, H]` the cache, which holds them already: query t is at position
`position[b] + t` (by default t), and slot s holds position s. A query sees slot s where

    s < length[b],  s <= its position,  and s > its position - window or s < sinks.

Ragged: with `starts` `[B, R + 1]`, ascending, the tokens `starts[b, r] <= t < starts[b, r + 1]` of a row are
sequence r; token t is in slot t, and sees slots of its own sequence only. Block-sparse: with `counts`
`[B, X, ceil(T / bq)]`, `lists` `[B, X, ceil(T / bq), most]` and `sparse_block = (bq, bk)`, a block of bq queries sees
of the blocks of bk slots only the first `counts` in its list, each at most once; X is K, or N where query heads have
lists of their own. Codes of a quantized cache, int8 or float8, have `k_scale` and `v_scale` `[B, K, S]`. `lse` is the
log of the sum of the exponentials of a query's scores, -inf where it sees nothing; its output is then 0. The function
of `gradient.py` is the same and has a gradient. (FlashAttention, 2205.14135; 2307.08691.)
"""

from pallas_kernels.prefill_attention.gpu import prefill_attention as gpu
from pallas_kernels.prefill_attention.reference import prefill_attention as reference
from pallas_kernels.prefill_attention.tpu import prefill_attention as tpu

__all__ = ["gpu", "reference", "tpu"]
