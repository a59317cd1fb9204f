"""What prefill attention is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.prefill_attention import peers, reference, tpu
from pallas_kernels.prefill_attention.reference import named, visible
from pallas_kernels.prefill_attention.tpu import shape_class

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = ("odd_63", "chunk", "window_sinks", "sparse", "int8")


def case(
    name: str,
    B: int,
    T: int,
    K: int,
    G: int,
    S: int,
    H: int,
    *,
    dtype: Any = BF16,
    cache: Any = None,
    scales: Any = F32,
    position: list[int] | None = None,
    length: list[int] | None = None,
    starts: list[list[int]] | None = None,
    lists: tuple[np.ndarray, np.ndarray] | None = None,
    blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `cache` is the dtype of a quantized cache, whose scales come with it."""
    struct = jax.ShapeDtypeStruct
    stored = cache or dtype
    shapes: dict[str, Any] = {
        "q": struct((B, T, K * G, H), dtype),
        "k": struct((B, K, S, H), stored),
        "v": struct((B, K, S, H), stored),
    }
    if cache is not None:
        shapes |= {name: struct((B, K, S), scales) for name in ("k_scale", "v_scale")}
    for key, value in (("position", position), ("length", length), ("starts", starts)):
        if value is not None:
            shapes[key] = np.array(value, np.int32)
    if lists is not None:
        shapes |= {"lists": lists[0], "counts": lists[1]}
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, **options},
        flops=4.0 * _pairs(shapes, options) * G * H,
        bytes=2.0 * B * T * K * G * H * jnp.dtype(dtype).itemsize + 2.0 * B * K * S * H * jnp.dtype(stored).itemsize,
        blocks={
            "queries": 32,
            "slots": 128 if cache is not None else 32 if S % 32 == 0 else 64,
            "rows": 16,
            "buffers": 3,
        }
        | (blocks or {}),
        spoil=_spoil if length is not None or position is not None else None,
        races=name in RACES,
    )


def _pairs(shapes: dict[str, Any], options: dict[str, Any]) -> float:
    """Return how many pairs of a query and a slot that it sees there are, over rows and heads of keys."""
    B, T, _, _ = shapes["q"].shape
    K, S = shapes["k"].shape[1:3]
    words = [shapes.get(name) for name in ("position", "length", "starts")]
    if T * S > 2**22 and "lists" not in shapes:
        return B * K * T * (T + 1) / 2  # causal and nothing else: that is all that is timed at such a size
    with jax.ensure_compile_time_eval():
        seen = visible(T, S, B, *words, options.get("window"), options.get("sinks", 0))
        if "lists" not in shapes:
            return float(np.asarray(seen).sum()) * K
        X = shapes["lists"].shape[1]
        both = seen[:, None] & named(shapes["lists"], shapes["counts"], options["sparse_block"], T, S)
        return float(np.asarray(both).sum()) * K / X


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill the slots that no query sees with NaN, or where there is none the largest code and a NaN scale."""
    B, T, _, _ = inputs["q"].shape
    S = inputs["k"].shape[2]
    end = inputs.get("length", np.full(B, S))
    dead = np.arange(S) >= end[:, None]
    changed = dict(inputs)
    for name in ("k", "v"):
        worst = jnp.nan if jnp.issubdtype(inputs[name].dtype, jnp.floating) else 127
        changed[name] = jnp.where(dead[:, None, :, None], jnp.asarray(worst, inputs[name].dtype), inputs[name])
        if f"{name}_scale" in inputs:
            changed[f"{name}_scale"] = jnp.where(dead[:, None], jnp.nan, inputs[f"{name}_scale"])
    return changed


def random_lists(
    B: int, X: int, T: int, S: int, block: tuple[int, int], density: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return lists that name about `density` of the causal blocks, the diagonal among them; X - 1 lists of row 0 are
    left out where density is 0."""
    rng = np.random.default_rng(5)
    bq, bk = block
    Q = -(-T // bq)
    most = max(1, -(-S // bk))
    lists, counts = np.zeros((B, X, Q, most), np.int32), np.zeros((B, X, Q), np.int32)
    for at in np.ndindex(B, X, Q):
        blocks = np.arange(min(most, -(-min(T, (at[2] + 1) * bq) // bk)))
        keep = max(1, round(density * len(blocks))) if density else 0
        chosen = np.sort(np.append(rng.choice(blocks[:-1], keep - 1, replace=False), blocks[-1])) if keep else []
        lists[at][: len(chosen)], counts[at] = chosen, len(chosen)
    return lists, counts


def _some_empty(lists: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    counts = lists[1].copy()
    counts[:, :, 1::3] = 0
    return lists[0], counts


TESTS = [
    case("odd_63", 2, 63, 1, 1, 63, 64, dtype=F32, return_lse=True),
    case("odd_60", 1, 60, 2, 2, 60, 80, dtype=F32, blocks={"rows": 32}),
    case("odd_130", 1, 130, 1, 2, 160, 64, dtype=F32, length=[130]),
    case("gqa_4_h96", 1, 96, 2, 4, 96, 96, dtype=F32, softcap=4.0),
    case("gqa_8_h128", 1, 40, 1, 8, 64, 128, dtype=F32, blocks={"rows": 64}),
    case("h256", 1, 48, 1, 1, 64, 256, dtype=F32),
    case("chunk", 3, 40, 2, 2, 128, 64, position=[80, 3, 0], length=[120, 43, 40], dtype=F32, return_lse=True),
    case("short_rows", 3, 40, 2, 1, 64, 64, position=[20, 0, 0], length=[33, 1, 0], dtype=F32, return_lse=True),
    case("packed", 2, 96, 1, 2, 96, 64, starts=[[0, 1, 40, 70], [0, 33, 33, 95]], dtype=F32),
    case("packed_window", 1, 96, 2, 1, 96, 64, starts=[[0, 50]], window=20, dtype=F32),
    case("window", 2, 128, 1, 2, 128, 64, window=20, dtype=F32),
    case("window_over_length", 1, 64, 1, 2, 64, 64, window=100, dtype=F32),
    case("window_sinks", 1, 160, 1, 2, 160, 64, window=20, sinks=4, dtype=F32),
    case("sparse", 1, 128, 2, 2, 128, 64, lists=random_lists(1, 2, 128, 128, (32, 32), 0.5), sparse_block=(32, 32),
         dtype=F32),
    case("sparse_heads", 2, 128, 1, 4, 128, 64, lists=random_lists(2, 4, 128, 128, (32, 64), 0.5), sparse_block=(32, 64),
         dtype=F32, return_lse=True),
    case("sparse_empty", 1, 100, 1, 2, 128, 64, lists=_some_empty(random_lists(1, 1, 100, 128, (16, 32), 0.5)),
         sparse_block=(16, 32), window=50, dtype=F32),
    case("bf16", 1, 200, 2, 4, 256, 128, length=[200], blocks={"rows": 64, "slots": 64}),
    case("int8", 2, 100, 2, 2, 256, 128, position=[150, 0], length=[250, 100], cache=jnp.int8),
    case("fp8", 2, 100, 1, 4, 256, 128, position=[30, 0], length=[130, 100], cache=jnp.float8_e4m3fn, scales=BF16),
]  # fmt: skip

TIMED = [
    case("causal_8k", 1, 8192, 1, 1, 8192, 128),
    case("causal_4k_gqa4", 1, 4096, 1, 4, 4096, 128),
    case("chunk_1k_at_7k", 1, 1024, 1, 4, 8192, 128, position=[7168]),
    case("window_1k", 1, 4096, 1, 4, 4096, 128, window=1024, sinks=4),
    case("causal_4k_gqa4_int8", 1, 4096, 1, 4, 4096, 128, cache=jnp.int8),
    case("blocks_dense", 1, 8192, 1, 1, 8192, 128, lists=random_lists(1, 1, 8192, 8192, (512, 512), 1.0),
         sparse_block=(512, 512)),
    case("blocks_quarter", 1, 8192, 1, 1, 8192, 128, lists=random_lists(1, 1, 8192, 8192, (512, 512), 0.25),
         sparse_block=(512, 512)),
]  # fmt: skip


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try: 512 to 2048 rows of queries against 512 or 1024 slots, in parts of 128 or 256 rows."""
    del case, chip
    return [
        {"queries": queries, "slots": slots, "rows": rows, "buffers": 3}
        for queries in (512, 1024, 2048)
        for slots in (512, 1024)
        for rows in (128, 256)
    ]


KERNEL = Kernel("prefill_attention", tpu, reference, TESTS, TIMED, candidates, shape_class, peers.PEERS)
