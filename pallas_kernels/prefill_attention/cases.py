"""What prefill attention is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.prefill_attention import gpu, reference, tpu
from pallas_kernels.prefill_attention.gpu_peers import GPU_PEERS
from pallas_kernels.prefill_attention.peers import PEERS
from pallas_kernels.prefill_attention.tpu import shape_class

F32 = jnp.float32


def case(
    name: str,
    B: int,
    T: int,
    K: int,
    G: int,
    S: int,
    H: int,
    *,
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    scales: Any = jnp.float32,
    position: list[int] | None = None,
    length: list[int] | None = None,
    starts: list[list[int]] | None = None,
    sparse: tuple[np.ndarray, np.ndarray] | None = None,
    pairs: float = 0.0,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `cache` is the dtype of a quantized cache, whose scales come with it, `sparse` counts and lists.

    `pairs` of a query and a slot that it sees, of one row and head, are counted where a case is timed.
    """
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
    if sparse is not None:
        shapes |= {"counts": sparse[0], "lists": sparse[1]}
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, **options},
        flops=4.0 * pairs * B * K * G * H,
        bytes=2.0 * B * K * S * H * jnp.dtype(stored).itemsize + 2.0 * B * T * K * G * H * jnp.dtype(dtype).itemsize,
        blocks={"queries": 32, "slots": 128, "rows": 32, "buffers": 2} | (blocks or {}),
        gpu_blocks=gpu_blocks,
        spoil=_spoil,
        races=name in RACES,
    )


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill the slots that are not live with NaN, or where there is none the largest code and a NaN scale."""
    B, _, S, _ = inputs["k"].shape
    end = np.asarray(inputs.get("length", np.full(B, S)))
    if "starts" in inputs:
        end = np.minimum(end, np.asarray(inputs["starts"])[:, -1])
    dead = np.arange(S) >= end[:, None]
    changed = dict(inputs)
    for name in ("k", "v"):
        worst = jnp.nan if jnp.issubdtype(inputs[name].dtype, jnp.floating) else 127
        changed[name] = jnp.where(dead[:, None, :, None], jnp.asarray(worst, inputs[name].dtype), inputs[name])
        if f"{name}_scale" in inputs:
            changed[f"{name}_scale"] = jnp.where(dead[:, None], jnp.nan, inputs[f"{name}_scale"])
    return changed


def random_lists(
    B: int, X: int, T: int, S: int, block: tuple[int, int], density: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and lists of a share of the blocks up to the diagonal, with the last one of every row."""
    rng = np.random.default_rng(seed)
    Tq, Sk = -(-T // block[0]), -(-S // block[1])
    counts, lists = np.zeros((B, X, Tq), np.int32), np.zeros((B, X, Tq, Sk), np.int32)
    ends = np.minimum(-(-(np.arange(Tq) + 1) * block[0] // block[1]), Sk)  # blocks up to the diagonal
    total = np.maximum(np.round(density * ends.cumsum()).astype(int), np.arange(Tq) + 1)
    wanted = np.diff(total, prepend=0)
    for at in np.ndindex(B, X, Tq):
        count, last = min(wanted[at[2]], ends[at[2]]), ends[at[2]] - 1
        counts[at] = count
        lists[(*at, slice(count))] = np.sort(np.append(rng.choice(max(last, 1), count - 1, replace=False), last))
    return counts, lists


def _some_empty(sparse: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    counts, lists = sparse
    counts = counts.copy()
    counts[:, :, 1] = 0
    return counts, lists


RACES = ("odd_63", "chunk", "ragged", "window_sinks", "sparse", "int8")
_FEW = {"queries": 128, "slots": 128, "stages": 2, "processors": 3}  # a GPU's, each with some blocks of queries
_SPARSE = {"sparse_block": (32, 128), "return_lse": True, "dtype": F32}

TESTS = [
    case("odd_63", 2, 63, 1, 1, 63, 64, dtype=F32, return_lse=True),
    case("odd_60_h80", 2, 60, 2, 2, 60, 80, dtype=F32, length=[60, 33], return_lse=True),
    case("odd_130_h96", 1, 130, 1, 4, 130, 96, dtype=F32, blocks={"rows": 64}),
    case("gqa_8_h128", 1, 130, 1, 8, 256, 128, dtype=F32, softcap=5.0, blocks={"rows": 128}, gpu_blocks=_FEW),
    case("h256", 1, 70, 2, 1, 128, 256, dtype=F32, blocks={"rows": 16, "buffers": 3}),
    case("chunk", 3, 40, 2, 2, 384, 64, dtype=F32, position=[0, 300, 120], length=[40, 340, 160], return_lse=True,
         gpu_blocks=_FEW),
    case("empty_rows", 3, 40, 2, 1, 256, 64, dtype=F32, position=[0, 7, -1], length=[0, 30, 0], return_lse=True),
    # Slots that are a part of a row's: queries begin before them, run past them, are past them all, or before them all.
    case("part", 4, 40, 2, 2, 256, 64, dtype=F32, position=[-20, 240, 400, -90], length=[20, 280, 440, -50],
         return_lse=True),
    case("part_window", 4, 40, 2, 2, 256, 64, dtype=F32, position=[-20, 240, 270, -90], length=[20, 280, 310, -50],
         window=30, return_lse=True),
    case("window", 1, 300, 1, 2, 300, 64, dtype=F32, window=50),
    case("window_over_length", 2, 100, 1, 2, 128, 64, dtype=F32, window=500, length=[100, 60]),
    case("window_sinks", 1, 64, 1, 2, 512, 64, dtype=F32, window=40, sinks=4, position=[440], return_lse=True),
    case("ragged", 2, 200, 2, 2, 200, 64, dtype=F32, starts=[[0, 5, 64, 64, 190], [3, 10, 129, 130, 200]],
         return_lse=True),
    case("ragged_window", 1, 300, 1, 2, 300, 64, dtype=F32, starts=[[0, 90, 280]], window=33, softcap=4.0),
    case("sparse", 1, 256, 2, 2, 256, 64, sparse=random_lists(1, 2, 256, 256, (32, 128), 0.5), **_SPARSE),
    case("sparse_empty", 1, 130, 2, 2, 384, 64, position=[200],
         sparse=_some_empty(random_lists(1, 4, 130, 384, (32, 128), 0.6, 1)), **_SPARSE),
    case("sparse_128", 2, 300, 2, 2, 384, 64, sparse=_some_empty(random_lists(2, 2, 300, 384, (128, 128), 0.7, 2)),
         **_SPARSE | {"sparse_block": (128, 128)}, gpu_blocks=_FEW),
    case("bf16", 2, 200, 2, 4, 256, 128, position=[0, 50], length=[200, 250], blocks={"queries": 64, "rows": 128}),
    case("int8", 1, 130, 2, 4, 256, 128, cache=jnp.int8, length=[120]),
    case("fp8", 1, 130, 2, 4, 256, 128, cache=jnp.float8_e4m3fn, scales=jnp.bfloat16, position=[60],
         length=[190]),
]  # fmt: skip


def _real(name: str, G: int, T: int, S: int, pairs: float, **options: Any) -> Case:
    """Return a case of one key head: others would do the same again, and a simulation stays short."""
    return case(name, 1, T, 1, G, S, 128, pairs=pairs, **options)


def _sparse(name: str, block: tuple[int, int]) -> Case:
    """Return a quarter of the blocks of causal attention over 8192 tokens."""
    lists = random_lists(1, 1, 8192, 8192, block, 0.25)
    pairs = _pairs(lists[0][0, 0], lists[1][0, 0], block)
    return _real(name, 1, 8192, 8192, pairs, sparse=lists, sparse_block=block)


def _pairs(counts: np.ndarray, lists: np.ndarray, block: tuple[int, int]) -> float:
    """Return the pairs of a query and a slot that it sees, of one row and head with its lists."""
    bq, bk = block
    tokens = np.arange(len(counts))[:, None, None] * bq + np.arange(bq)  # [Tq, 1, bq]
    seen = np.clip(tokens + 1 - lists[:, :, None] * bk, 0, bk).sum(-1)
    return float(seen[np.arange(lists.shape[1]) < counts[:, None]].sum())


_4K, _8K = 4096 * 4097 / 2, 8192 * 8193 / 2  # pairs of causal attention
TIMED = [
    _real("g1_s8192", 1, 8192, 8192, _8K),
    _real("g4_s4096", 4, 4096, 4096, _4K),
    _real("g4_t512_s8192", 4, 512, 8192, 512 * 7680 + 512 * 513 / 2, position=[7680]),
    _real("g4_s4096_window", 4, 4096, 4096, 1024 * 1025 / 2 + 3072 * 1024, window=1024),
    _real("g4_s4096_int8", 4, 4096, 4096, _4K, cache=jnp.int8),
    _sparse("g1_s8192_sparse", (512, 512)),
    _sparse("g1_s8192_sparse_1024", (1024, 512)),
]  # fmt: skip


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try; a sparse case has its own queries and slots."""
    del chip
    sizes = [(512, 256), (512, 512)] if "lists" in case.shapes else [(512, 512), (1024, 512)]
    return [{"queries": queries, "slots": 512, "rows": rows, "buffers": 2} for queries, rows in sizes]


def _gpu(name: str, T: int, S: int, pairs: float, **options: Any) -> Case:
    """Return a case of 16384 tokens of 32 query heads and 8 key heads, as many rows of T as that takes."""
    return case(name, 16384 // T, T, 8, 4, S, 128, pairs=pairs, **options)


def _gpu_sparse(name: str, block: tuple[int, int]) -> Case:
    lists = random_lists(2, 8, 8192, 8192, block, 0.25)
    pairs = sum(_pairs(lists[0][at], lists[1][at], block) for at in np.ndindex(2, 8)) / 16
    return _gpu(name, 8192, 8192, pairs, sparse=lists, sparse_block=block)


_16K = 16384 * 16385 / 2
GPU_TIMED = [
    _gpu("gpu_s4096", 4096, 4096, _4K),
    _gpu("gpu_s8192", 8192, 8192, _8K),
    _gpu("gpu_s16384", 16384, 16384, _16K),
    _gpu("gpu_s8192_window", 8192, 8192, 1024 * 1025 / 2 + 7168 * 1024, window=1024),
    _gpu("gpu_t512_s8192", 512, 8192, 512 * 7680 + 512 * 513 / 2, position=[7680] * 32, length=[8192] * 32),
    _gpu_sparse("gpu_s8192_sparse", (512, 512)),
]


def gpu_candidates(case: Case) -> list[dict[str, int]]:
    """Return blocks to try on a GPU."""
    H = case.shapes["q"].shape[3]
    sizes = {64: [(128, 128, 4), (192, 64, 6)], 128: [(128, 128, 2), (128, 64, 4)], 256: [(128, 64, 2)]}[H]
    names = ("queries", "slots", "stages", "processors")
    return [dict(zip(names, (*size, processors), strict=True)) for size in sizes for processors in (132, 0)]


KERNEL = Kernel(
    "prefill_attention", tpu, reference, TESTS, TIMED, candidates, shape_class, PEERS,
    gpu=gpu, gpu_candidates=gpu_candidates, gpu_peers=GPU_PEERS, gpu_timed=GPU_TIMED,
)  # fmt: skip
