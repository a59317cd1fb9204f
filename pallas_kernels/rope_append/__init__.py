"""Few new tokens on their way into attention on a GPU: queries and keys rotated, keys and values appended, at once.

    rope_append(q, k, v, cos, sin, start, counts, k_cache, v_cache) -> (q [B, T, N, H], (k_cache, v_cache))

q `[B, T, N, H]`, k and v `[B, T, K, H]` are what the projections gave of T tokens a row, cos and sin `[B, T, H / 2]`
float32 of their angles: half-pairs `(x[h], x[h + H / 2])` of queries and keys turn by them (RoPE, 2104.09864). Row b's
first counts[b] tokens are written to the caches `[B, K, S, H]` at slots from start[b]; what would pass the last slot is
dropped. With `ring` they are written to slots mod S: a cache of the newest S tokens, of which T are at most new. With
`table` `[B, M]` the caches are pages `[P, K, page, H]`, and slot s of row b is slot `s % page` of page
`table[b, s // page]`.

Caches of int8, or of uint8, which hold the bits of float8_e4m3fn, have `k_scale` and `v_scale` `[B, K, S]` bfloat16,
which follow them in what comes back: codes are `x / scale` rounded, with `scale = max |x| / largest code` of a token's
head. The caches are changed in place where they are donated.

With one row XLA makes four kernels of it, ten where the cache is quantized, whose launches take longer than their work.
On TPUs, where a launch costs nothing, there is no kernel.
"""

from pallas_kernels.rope_append.gpu import rope_append as gpu
from pallas_kernels.rope_append.reference import rope_append as reference

__all__ = ["gpu", "reference"]
