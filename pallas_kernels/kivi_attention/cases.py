"""What attention over packed groups is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.decode_attention.gpu_rows import block_class
from pallas_kernels.kivi_attention import gpu, reference, tpu
from pallas_kernels.kivi_attention.tpu import shape_class

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = ("blocks", "bf16")


def case(
    name: str,
    B: int,
    T: int,
    K: int,
    G: int,
    S: int,
    H: int,
    length: list[int],
    *,
    group: int = 64,
    runs: int = 1,
    dtype: Any = BF16,
    grid: Any = BF16,
    ahead: int = 70,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `grid` is the dtype of scales and offsets, `ahead` how far queries are past the packed tokens."""
    shapes = packed(B, T, K, G, S, H, group=group, runs=runs, dtype=dtype, grid=grid)
    shapes |= {"length": np.array(length, np.int32), "position": np.array(length, np.int32) + ahead}
    live = sum(length)
    size = jnp.dtype(grid).itemsize
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, "group": group, **options},
        flops=4.0 * live * T * K * G * H,
        bytes=1.0 * live * K * (H + 2 * size * (H / group + runs)),
        blocks={"slots": S, "heads": 2, "buffers": 2, "splits": 1} | (blocks or {}),
        gpu_blocks=gpu_blocks,
        spoil=spoil,
        races=name in RACES,
    )


def packed(
    B: int, T: int, K: int, G: int, S: int, H: int, *, group: int, runs: int, dtype: Any, grid: Any
) -> dict[str, Any]:
    """Return the shapes of queries and of packed groups."""
    struct = jax.ShapeDtypeStruct
    M = S // group
    return {
        "q": struct((B, T, K * G, H), dtype),
        "k_codes": struct((B, K, S // 2, H), jnp.uint8),
        "v_codes": struct((B, K, S // 2, H), jnp.uint8),
        "k_scale": struct((B, K, M, H), grid),
        "k_offset": struct((B, K, M, H), grid),
        "v_scale": struct((B, K * runs, S), grid),
        "v_offset": struct((B, K * runs, S), grid),
    }


def spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill the scales and offsets of groups that are not live with NaN."""
    length, changed = inputs["length"], dict(inputs)
    S, M = inputs["v_scale"].shape[2], inputs["k_scale"].shape[2]
    for name in ("k_scale", "k_offset"):
        dead = np.arange(M) * (S // M) >= length[:, None]
        changed[name] = jnp.where(dead[:, None, :, None], jnp.nan, inputs[name])
    for name in ("v_scale", "v_offset"):
        changed[name] = jnp.where((np.arange(S) >= length[:, None])[:, None], jnp.nan, inputs[name])
    return changed


TESTS = [
    case("one_group", 2, 1, 1, 1, 64, 64, [64, 0], dtype=F32, grid=F32, return_lse=True),
    case("gqa_4_runs_2", 2, 2, 2, 4, 256, 64, [192, 256], runs=2, dtype=F32, grid=F32),
    case("group_128_runs_4", 2, 4, 2, 2, 512, 128, [128, 512], group=128, runs=4, dtype=F32, grid=F32),
    case("one_run_of_80", 1, 1, 1, 2, 128, 80, [128], dtype=F32, grid=F32),
    case("window_softcap", 2, 1, 2, 2, 256, 64, [256, 64], window=150, softcap=4.0, dtype=F32, grid=F32),
    case("blocks", 2, 1, 2, 2, 2048, 64, [1600, 1024], dtype=F32, grid=F32, blocks={"slots": 1024}, return_lse=True),
    case("bf16", 2, 1, 2, 8, 2048, 128, [1600, 64], runs=2, blocks={"slots": 1024}),
]

# Groups of 32, which are the default of a cache; few and many splits; rows in more than one tile.
GPU_TESTS = [
    case("group_32", 2, 1, 2, 4, 512, 128, [480, 32], group=32, runs=4, ahead=90, return_lse=True),
    case("group_32_h64", 3, 1, 2, 4, 320, 64, [320, 64, 0], group=32, runs=2, return_lse=True),
    case("group_32_by_256", 2, 1, 2, 4, 512, 128, [480, 32], group=32, runs=4, gpu_blocks={"slots": 256}),
    case("group_64_by_128", 2, 1, 2, 4, 512, 128, [448, 64], runs=2, gpu_blocks={"slots": 128}),
    case("group_256", 2, 1, 1, 4, 1024, 128, [768, 256], group=256, return_lse=True),
    case("h256", 1, 1, 1, 8, 512, 256, [448], group=32, runs=8, return_lse=True),
    case("h192", 2, 1, 1, 2, 512, 192, [448, 64], runs=3),
    case("gpu_splits", 2, 2, 2, 4, 2048, 128, [1984, 320], runs=2, gpu_blocks={"splits": 3, "stages": 2},
         window=900, return_lse=True),
    case("rows_of_20", 2, 5, 1, 4, 512, 128, [512, 64], group=32, runs=4, softcap=4.0, return_lse=True),
    case("rows_of_32_split", 2, 8, 2, 4, 1024, 64, [1024, 256], group=32, runs=2, window=200, return_lse=True,
         gpu_blocks={"splits": 2, "cluster": 0}),
    case("rows_of_16_clustered", 1, 4, 2, 4, 1024, 128, [960], group=32, runs=4, return_lse=True,
         gpu_blocks={"splits": 4, "cluster": 1, "stages": 2}),
    case("cluster_8", 2, 1, 1, 8, 2048, 64, [2048, 192], return_lse=True, gpu_blocks={"splits": 8, "cluster": 1}),
]  # fmt: skip

TIMED = [
    case("b8_s4096", 8, 1, 8, 8, 4096, 128, [4096] * 8, runs=1),
    case("b8_s4096_runs_4", 8, 1, 8, 8, 4096, 128, [4096] * 8, runs=4),
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try."""
    del case, chip
    return [{"slots": slots, "heads": 8, "buffers": 2, "splits": 1} for slots in (1024, 2048)]


def gpu_candidates(case: Case) -> list[dict[str, int]]:
    """Return blocks to try on a GPU; splits fill all processors."""
    found = [{"slots": slots, "stages": stages} for slots in (128, 256) for stages in (2, 3)]
    if case.shapes["q"].shape[0] < 16:
        found += [found[i] | {"splits": 8, "cluster": 1} for i in (0, 2)]
    return found


def gpu_class(q: Any, k_codes: Any, *_: Any, group: int, **__: Any) -> dict[str, int | str]:
    """Return the key of the table of a GPU's blocks."""
    (B, T, N, H), (K, half) = q.shape, k_codes.shape[1:3]
    return block_class(k_codes.dtype, B * K, N // K * T, 2 * half, H)


GPU_TIMED = [
    *[case(f"g4_b{B}_s8192", B, 1, 8, 4, 8192, 128, [8192] * B, group=32, runs=4) for B in (1, 4, 16, 64)],
    *[case(f"g4_b{B}_s8192_group_64", B, 1, 8, 4, 8192, 128, [8192] * B, runs=2) for B in (1, 16)],
    case("g4_b16_s8192_t4", 16, 4, 8, 4, 8192, 128, [8192] * 16, group=32, runs=4),
]

KERNEL = Kernel(
    "kivi_attention",
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
