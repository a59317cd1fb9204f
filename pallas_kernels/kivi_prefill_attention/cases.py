"""What attention of many tokens over packed groups is tested and timed on."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.kivi_attention.cases import packed, spoil
from pallas_kernels.kivi_prefill_attention import gpu, reference, tpu
from pallas_kernels.kivi_prefill_attention.tpu import shape_class

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = ("across_boundaries",)


def case(
    name: str,
    B: int,
    T: int,
    K: int,
    G: int,
    S: int,
    H: int,
    position: list[int],
    *,
    length: list[int] | None = None,
    group: int = 64,
    residual: int = 64,
    runs: int = 1,
    dtype: Any = BF16,
    grid: Any = BF16,
    blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `length` is by default what is packed for a row's last query."""
    at = np.array(position)[:, None] + np.arange(T)
    reach = np.minimum(group * np.maximum(0, (at + 1 - residual) // group), S)
    shapes = packed(B, T, K, G, S, H, group=group, runs=runs, dtype=dtype, grid=grid)
    shapes["length"] = np.array(reach[:, -1] if length is None else length, np.int32)
    shapes["position"] = np.array(position, np.int32)
    seen = np.minimum(reach, shapes["length"][:, None])
    low = np.zeros_like(at) if "window" not in options else np.maximum(at - options["window"] + 1, 0)
    size = jnp.dtype(grid).itemsize
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, "group": group, "residual": residual, **options},
        flops=4.0 * np.maximum(seen - low, 0).sum() * K * G * H,
        bytes=1.0 * seen.max(1).sum() * K * (H + 2 * size * (H / group + runs))
        + 2.0 * B * T * K * G * H * jnp.dtype(dtype).itemsize,
        blocks={"queries": 32, "slots": 128, "rows": 32, "buffers": 2} | (blocks or {}),
        spoil=spoil,
        races=name in RACES,
    )


TESTS = [
    case("odd_63", 2, 63, 1, 1, 256, 64, [0, 193], dtype=F32, grid=F32, return_lse=True),
    case("across_boundaries", 2, 60, 2, 2, 192, 64, [100, 200], runs=2, dtype=F32, grid=F32, return_lse=True),
    case("gqa_8_runs_4", 1, 40, 1, 8, 512, 128, [500], group=128, runs=4, residual=33, dtype=F32, grid=F32,
         blocks={"rows": 128}),
    case("one_run_of_80", 1, 70, 1, 2, 128, 80, [90], residual=0, dtype=F32, grid=F32),
    case("window_softcap", 2, 130, 2, 2, 256, 64, [0, 170], window=90, softcap=4.0, dtype=F32, grid=F32),
    case("shorter_than_packed", 2, 40, 1, 2, 512, 64, [400, 400], length=[128, 0], dtype=F32, grid=F32,
         return_lse=True),
    case("bf16", 2, 130, 2, 4, 512, 128, [0, 380], runs=2, blocks={"queries": 64, "slots": 256, "rows": 128}),
]  # fmt: skip

TIMED = [  # one key head: others would do the same again
    case("g4_s4096", 1, 4096, 1, 4, 4096, 128, [0], runs=2),
    case("g4_t256_s8192", 1, 256, 1, 4, 8192, 128, [7936], runs=2),
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try."""
    del case, chip
    return [{"queries": queries, "slots": 512, "rows": 512, "buffers": 2} for queries in (512, 1024)]


GPU_TESTS = [  # groups of 32, which are the default of a cache
    case("group_32", 2, 300, 2, 4, 512, 128, [0, 200], group=32, runs=4, return_lse=True),
    case("group_32_window", 1, 200, 1, 2, 512, 64, [300], group=32, residual=40, runs=2, window=150),
]

GPU_TIMED = [
    case("g4_t1024_s8192", 1, 1024, 8, 4, 8192, 128, [7168], group=32, runs=4),
    case("g4_s8192", 1, 8192, 8, 4, 8192, 128, [0], group=32, runs=4),
]

KERNEL = Kernel(
    "kivi_prefill_attention",
    tpu,
    reference,
    TESTS,
    TIMED,
    candidates,
    shape_class,
    gpu=gpu,
    gpu_timed=GPU_TIMED,
    gpu_tests=GPU_TESTS,
)
