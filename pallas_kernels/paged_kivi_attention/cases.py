"""What attention over pages of packed groups is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.decode_attention.gpu_rows import block_class
from pallas_kernels.kivi_attention.cases import gpu_candidates
from pallas_kernels.paged_kivi_attention import gpu, reference, tpu
from pallas_kernels.paged_kivi_attention.tpu import shape_class

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = ("splits",)


def case(
    name: str,
    B: int,
    T: int,
    K: int,
    G: int,
    page: int,
    H: int,
    length: list[int],
    *,
    group: int = 64,
    runs: int = 1,
    dtype: Any = BF16,
    grid: Any = BF16,
    ahead: int = 70,
    most: int | None = None,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case whose rows have their pages anywhere; `most` is the number of entries of a row's table."""
    struct = jax.ShapeDtypeStruct
    M = most or -(-max(length) // page)
    P = B * M + 3
    numbers = np.random.default_rng(7).permutation(P)[: B * M].astype(np.int32)
    shapes: dict[str, Any] = {
        "q": struct((B, T, K * G, H), dtype),
        "codes": struct((P, 2, K, page // 2, H), jnp.uint8),
        "key_grids": struct((P, 2, K, page // group, H), grid),
        "value_grids": struct((P, 2, K * runs, page), grid),
        "table": numbers.reshape(B, M),
        "length": np.array(length, np.int32),
        "position": np.array(length, np.int32) + ahead,
    }
    live, size = sum(length), jnp.dtype(grid).itemsize
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, "group": group, **options},
        flops=4.0 * live * T * K * G * H,
        bytes=1.0 * live * K * (H + 2 * size * (H / group + runs)),
        blocks={"slots": 2 * page, "heads": 2, "buffers": 3, "splits": 1} | (blocks or {}),
        gpu_blocks=gpu_blocks,
        spoil=_spoil,
        races=name in RACES,
    )


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill the grids of what is not live with NaN; entries of the table past the length name no page."""
    changed, length, table = dict(inputs), inputs["length"], inputs["table"]
    M, page = table.shape[1], inputs["value_grids"].shape[3]
    groups = inputs["key_grids"].shape[3]
    live = np.zeros((len(inputs["codes"]), page), bool)
    for b in range(len(table)):
        live[table[b]] = np.arange(M * page).reshape(M, page) < length[b]
    of_groups = live[:, :: page // groups]
    changed["key_grids"] = jnp.where(of_groups[:, None, None, :, None], inputs["key_grids"], jnp.nan)
    changed["value_grids"] = jnp.where(live[:, None, None], inputs["value_grids"], jnp.nan)
    changed["table"] = np.where(np.arange(M) * page < length[:, None], table, 10**6).astype(np.int32)
    return changed


TESTS = [
    case("one_group_a_page", 3, 1, 1, 1, 64, 64, [64, 0, 192], dtype=F32, grid=F32, return_lse=True),
    case("heads_apart_runs_2", 2, 2, 4, 4, 128, 64, [192, 256], runs=2, dtype=F32, grid=F32),
    case("group_128_window", 2, 4, 2, 2, 256, 80, [128, 512], group=128, window=300, softcap=4.0, dtype=F32, grid=F32),
    case("splits", 2, 1, 2, 2, 64, 64, [320, 64], dtype=F32, grid=F32, return_lse=True, blocks={"splits": 2}),
    case("bf16", 2, 1, 2, 8, 256, 128, [1600, 64], runs=2),
]

# Pages of a group; a block of several, and of a part of one; rows in more than one tile.
GPU_TESTS = [
    case("page_32", 2, 1, 2, 4, 32, 128, [480, 32], group=32, runs=4, return_lse=True),
    case("page_64_of_32", 3, 1, 2, 4, 64, 64, [320, 64, 0], group=32, runs=2, return_lse=True),
    case("page_256_by_128", 2, 1, 2, 4, 256, 128, [512, 96], group=32, runs=4, gpu_blocks={"slots": 128}),
    case("page_384", 2, 1, 1, 4, 384, 128, [768, 128], runs=2, return_lse=True),
    case("page_64_by_256", 2, 2, 2, 4, 64, 128, [960, 64], runs=2, window=500, gpu_blocks={"slots": 256}),
    case("page_512", 2, 1, 1, 8, 512, 64, [1024, 256], group=256, return_lse=True, gpu_blocks={"splits": 2}),
    case("rows_of_20", 2, 5, 1, 4, 128, 128, [512, 64], group=32, runs=4, softcap=4.0, return_lse=True),
    case("cluster_4", 2, 1, 1, 8, 128, 64, [1024, 192], return_lse=True, gpu_blocks={"splits": 4, "cluster": 1}),
]

TIMED = [
    case("b8_s4096_p128", 8, 1, 8, 8, 128, 128, [4096] * 8, runs=2),
    case("b8_s4096_p256", 8, 1, 8, 8, 256, 128, [4096] * 8, runs=2),
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try."""
    del case, chip
    return [{"slots": slots, "heads": 8, "buffers": 2, "splits": 1} for slots in (1024, 2048)]


def gpu_class(q: Any, codes: Any, *_: Any, table: Any, **__: Any) -> dict[str, int | str]:
    """Return the key of the table of a GPU's blocks."""
    (B, T, N, H), (K, half) = q.shape, codes.shape[2:4]
    return block_class(codes.dtype, B * K, N // K * T, table.shape[1] * 2 * half, H)


GPU_TIMED = [
    *[case(f"g4_b{B}_s8192_p64", B, 1, 8, 4, 64, 128, [8192] * B, group=32, runs=4) for B in (1, 16)],
    case("g4_b16_s8192_p256", 16, 1, 8, 4, 256, 128, [8192] * 16, group=32, runs=4),
]

KERNEL = Kernel(
    "paged_kivi_attention",
    tpu,
    reference,
    TESTS,
    TIMED,
    candidates,
    shape_class,
    gpu=gpu,
    gpu_candidates=gpu_candidates,
    gpu_class=gpu_class,
    gpu_timed=GPU_TIMED,
    gpu_tests=GPU_TESTS,
)
