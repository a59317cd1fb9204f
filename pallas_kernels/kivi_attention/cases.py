"""What attention over packed groups is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.kivi_attention import reference, tpu
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

TIMED = [
    case("b8_s4096", 8, 1, 8, 8, 4096, 128, [4096] * 8, runs=1),
    case("b8_s4096_runs_4", 8, 1, 8, 8, 4096, 128, [4096] * 8, runs=4),
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try."""
    del case, chip
    return [{"slots": slots, "heads": 8, "buffers": 2, "splits": 1} for slots in (1024, 2048)]


KERNEL = Kernel("kivi_attention", tpu, reference, TESTS, TIMED, candidates, shape_class)
