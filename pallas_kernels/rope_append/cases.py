"""What rotation and append are tested and timed on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.rope_append import gpu, reference

BF16 = jnp.bfloat16


def case(
    name: str, B: int, S: int, *, T: int = 1, N: int = 32, K: int = 8, H: int = 128, stored: Any = BF16,
    start: Sequence[int] | None = None, counts: Sequence[int] | None = None, pages: int | None = None, **options: Any,
) -> Case:  # fmt: skip
    """Return a case of B rows of T new tokens, which follow on the others of a cache of S slots.

    Or of `pages` of S slots a row, which may be anywhere; what a row has not reached is in none.
    """
    start = np.arange(B, dtype=np.int32) * 3 % (S - T + 1) if start is None else np.asarray(start, np.int32)
    counts = np.full(B, T, np.int32) if counts is None else np.asarray(counts, np.int32)
    angles = np.random.default_rng(0).uniform(0, 6, (B, T, H // 2)).astype(np.float32)
    held = (B, K, S) if pages is None else (B * pages + 2, K, S)
    cache = jax.ShapeDtypeStruct((*held, H), stored)
    shapes = {
        "q": jax.ShapeDtypeStruct((B, T, N, H), BF16),
        "k": jax.ShapeDtypeStruct((B, T, K, H), BF16), "v": jax.ShapeDtypeStruct((B, T, K, H), BF16),
        "cos": np.cos(angles), "sin": np.sin(angles), "start": start, "counts": counts,
        "k_cache": cache, "v_cache": cache,
    }  # fmt: skip
    donated: tuple[str, ...] = ("k_cache", "v_cache")
    if stored != BF16:
        shapes |= dict.fromkeys(("k_scale", "v_scale"), jax.ShapeDtypeStruct(held, BF16))
        donated += ("k_scale", "v_scale")
    if pages is not None:
        table = np.random.default_rng(5).permutation(held[0])[: B * pages].reshape(B, pages)
        reached = np.arange(pages) * S < (start + counts)[:, None]
        shapes["table"] = np.where(reached, table, 10**6).astype(np.int32)
    size = jnp.dtype(stored).itemsize
    moved = B * T * (N * H * 4 + 2 * K * H * (2 + size) + 4 * H)
    return Case(
        name, shapes, options, flops=6.0 * B * T * (N + K) * H, bytes=float(moved), donated=donated, rounded=True
    )  # fmt: skip


TESTS = [
    case("one_row", 1, 64),
    case("one_row_int8", 1, 64, stored=jnp.int8),
    case("one_row_fp8", 1, 64, stored=jnp.uint8),
    case("h64", 3, 24, T=2, N=9, K=3, H=64),
    case("h64_int8", 3, 24, T=2, N=9, K=3, H=64, stored=jnp.int8),
    case("h64_fp8", 3, 24, T=2, N=9, K=3, H=64, stored=jnp.uint8),
    case("h256", 2, 24, T=3, N=4, K=1, H=256),
    case("h256_int8", 2, 24, T=3, N=4, K=1, H=256, stored=jnp.int8),
    case("h256_fp8", 2, 24, T=3, N=4, K=1, H=256, stored=jnp.uint8),
    case("padded", 4, 16, T=5, N=4, K=2, start=[0, 3, 14, 16], counts=[5, 0, 5, 1]),
    case("padded_int8", 4, 16, T=5, N=4, K=2, stored=jnp.int8, start=[0, 3, 14, 16], counts=[5, 0, 5, 1]),
    case("ring", 5, 16, T=5, N=4, K=2, start=[0, 35, 14, 16, 1023], counts=[5, 0, 5, 1, 4], ring=True),
    case("ring_int8", 3, 8, T=8, N=4, K=2, stored=jnp.int8, start=[5, 40, 99], counts=[8, 8, 3], ring=True),
    case("pages", 5, 8, T=5, N=4, K=2, pages=4, start=[0, 6, 30, 15, 31], counts=[5, 0, 5, 1, 4]),
    case("pages_int8", 3, 16, T=3, N=4, K=2, stored=jnp.int8, pages=2, start=[15, 7, 31], counts=[3, 2, 1]),
]
TIMED = [
    case("b1_s8192", 1, 8192),
    case("b1_s8192_int8", 1, 8192, stored=jnp.int8),
    case("b16_s8192", 16, 8192),
    case("b16_s8192_int8", 16, 8192, stored=jnp.int8),
    case("b1_ring", 1, 128, start=[8191], ring=True),
    case("b1_p64", 1, 64, pages=128, start=[8191]),
]


KERNEL = Kernel("rope_append", None, reference, TESTS, TIMED, None, None, gpu=gpu, gpu_peers={"xla": reference})
