"""What decode attention is tested and timed on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.decode_attention import gpu, peers, reference, tpu
from pallas_kernels.decode_attention.gpu_rows import block_class
from pallas_kernels.decode_attention.tpu import shape_class


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
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    scales: Any = jnp.float32,
    start: list[int] | None = None,
    position: list[int] | None = None,
    tree: np.ndarray | None = None,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `cache` is the dtype of a quantized cache, whose scales come with it."""
    struct = jax.ShapeDtypeStruct
    stored = cache or dtype
    shapes: dict[str, Any] = {
        "q": struct((B, T, K * G, H), dtype),
        "k": struct((B, K, S, H), stored),
        "v": struct((B, K, S, H), stored),
        "length": np.array(length, np.int32),
    }
    if cache is not None:
        shapes |= {name: struct((B, K, S), scales) for name in ("k_scale", "v_scale")}
    for key, value in (("start", start), ("position", position)):
        if value is not None:
            shapes[key] = np.array(value, np.int32)
    if tree is not None:
        options["tree"] = tree
    reach = options.get("window") or S
    reach += T - 1 + options.get("sinks", 0)
    live = sum(min(n - s, reach) for n, s in zip(length, start or [0] * B, strict=True))
    size = jnp.dtype(stored).itemsize
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, **options},
        flops=4.0 * live * T * K * G * H,
        bytes=2.0 * live * K * (H * size + (4 if cache is not None else 0)),
        blocks={"slots": 128 if cache is not None else 32 if S % 32 == 0 else 64, "heads": 2, "buffers": 3, "splits": 1}
        | (blocks or {}),
        gpu_blocks=gpu_blocks,
        spoil=functools.partial(_spoil, ring=options.get("ring", False)),
        races=name in RACES,
    )


def _spoil(inputs: dict[str, Any], ring: bool) -> dict[str, Any]:
    """Fill the slots that are not live with NaN, or where there is none the largest code and a NaN scale."""
    S = inputs["k"].shape[2]
    start, length = inputs.get("start", np.zeros(len(inputs["length"]), np.int32)), inputs["length"][:, None]
    held = length - 1 - (length - 1 - np.arange(S)) % S if ring else np.arange(S)
    dead = (held < np.maximum(start, 0)[:, None]) | (held >= length)
    changed = dict(inputs)
    for name in ("k", "v"):
        worst = jnp.nan if jnp.issubdtype(inputs[name].dtype, jnp.floating) else 127
        changed[name] = jnp.where(dead[:, None, :, None], jnp.asarray(worst, inputs[name].dtype), inputs[name])
        if f"{name}_scale" in inputs:
            changed[f"{name}_scale"] = jnp.where(dead[:, None], jnp.nan, inputs[f"{name}_scale"])
    return changed


def chain(T: int) -> np.ndarray:
    """Return the tree that is a chain."""
    return np.tril(np.ones((T, T), bool))


def tree_of(parents: list[int]) -> np.ndarray:
    """Return which nodes each node sees, itself and its ancestors, of a tree of parent pointers (-1: a root)."""
    seen = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            seen[node] |= seen[parent]
    return seen


BRANCHING = tree_of([-1, 0, 0, 1, 1, 2, 3, 6])
F32 = jnp.float32
RACES = ("odd_60_t3", "starts", "window_sinks", "splits", "head_by_head", "int8")

TESTS = [
    case("odd_63", 3, 1, 1, 1, 63, 64, [0, 1, 63], dtype=F32, return_lse=True),
    case("odd_60_t3", 3, 3, 2, 2, 60, 80, [3, 40, 60], dtype=F32, return_lse=True),
    case("gqa_4_h96", 2, 2, 2, 4, 96, 96, [96, 17], dtype=F32),
    case("gqa_8_h128", 2, 1, 1, 8, 256, 128, [256, 129], dtype=F32, softcap=5.0),
    case("h256", 2, 1, 2, 1, 64, 256, [5, 64], dtype=F32),
    case("starts", 3, 2, 2, 2, 128, 64, [128, 70, 40], start=[100, 64, 40], dtype=F32, return_lse=True),
    case("window_over_length", 2, 2, 2, 2, 64, 64, [20, 64], window=100, dtype=F32),
    case("window_sinks", 2, 4, 2, 2, 256, 64, [250, 256], window=32, sinks=4, dtype=F32, return_lse=True),
    case("window", 2, 4, 2, 2, 256, 64, [250, 100], window=32, dtype=F32),
    case("positions", 3, 4, 2, 2, 64, 64, [33, 2, 0], position=[32, 0, -1], dtype=F32),
    # Slots that are a part of a row's: queries begin before them, run past them, are past them all, or before them all.
    case("part", 4, 4, 2, 2, 64, 64, [1, 66, 104, -36], position=[-3, 62, 100, -40], dtype=F32, return_lse=True),
    case(
        "part_window",
        4,
        4,
        2,
        2,
        64,
        64,
        [1, 66, 104, -36],
        position=[-3, 62, 100, -40],
        window=40,
        dtype=F32,
        return_lse=True,
    ),
    case("tree", 2, 8, 2, 2, 128, 64, [128, 60], tree=BRANCHING, dtype=F32),
    case("tree_window", 2, 8, 2, 2, 128, 64, [128, 60], tree=BRANCHING, window=20, dtype=F32),
    case("trees", 2, 4, 1, 2, 64, 64, [64, 30], tree=np.stack([tree_of([-1, -1, 0, 1]), chain(4)]), dtype=F32),
    # A block ends after the first node, which the second root does not see.
    case("two_roots", 1, 4, 1, 2, 128, 64, [67], tree=tree_of([-1, -1, 0, 1]), dtype=F32),
    case("splits", 3, 2, 2, 2, 256, 64, [250, 31, 0], dtype=F32, return_lse=True, blocks={"splits": 2}),
    case("head_by_head", 2, 1, 4, 2, 128, 64, [100, 128], dtype=F32, blocks={"heads": 1, "buffers": 2}),
    case("bf16", 2, 1, 2, 8, 512, 128, [512, 130]),
    case("int8", 2, 2, 2, 4, 512, 128, [512, 130], cache=jnp.int8),
    case("fp8", 2, 2, 2, 4, 512, 128, [512, 130], cache=jnp.float8_e4m3fn, scales=jnp.bfloat16),
    case("int8_heads", 2, 1, 4, 2, 256, 128, [256, 130], cache=jnp.int8, scales=jnp.bfloat16, blocks={"heads": 4}),
]


def _clusters() -> list[Case]:
    """Return cases whose splits are a cluster: of each size, with blocks, and whole rows, that have nothing to do."""
    i8, f8 = {"cache": jnp.int8}, {"cache": jnp.float8_e4m3fn}

    def clustered(splits: int, name: str, *sizes: Any, **options: Any) -> Case:
        return case(f"cluster_{name}", *sizes, gpu_blocks={"splits": splits, "stages": 2, "cluster": 1}, **options)

    return [
        clustered(2, "of_2", 2, 1, 2, 4, 512, 128, [500, 130], start=[70, 129]),
        clustered(4, "f16", 3, 2, 2, 2, 512, 64, [500, 31, 0], dtype=jnp.float16, return_lse=True),
        clustered(8, "window", 2, 4, 2, 2, 1024, 64, [1000, 100], window=300, sinks=4, return_lse=True),
        clustered(16, "of_16", 3, 1, 2, 4, 2048, 128, [2000, 700, 1], softcap=5.0, return_lse=True),
        clustered(16, "h80", 2, 3, 2, 4, 256, 80, [250, 70], return_lse=True),
        clustered(8, "h256", 1, 1, 2, 8, 1024, 256, [1000]),
        clustered(2, "tree", 2, 8, 2, 2, 256, 64, [250, 60], tree=BRANCHING, window=20),
        clustered(4, "tiles", 2, 10, 1, 8, 512, 64, [500, 70], return_lse=True),
        clustered(8, "int8", 3, 1, 2, 4, 2048, 128, [2000, 130, 0], return_lse=True, **i8),
        clustered(16, "int8_of_16", 2, 2, 2, 4, 2048, 64, [2000, 300], window=900, sinks=4, return_lse=True, **i8),
        clustered(4, "int8_rows", 2, 3, 2, 4, 512, 128, [500, 130], return_lse=True, **i8),
        clustered(2, "fp8", 2, 1, 2, 4, 1024, 128, [1000, 100], scales=jnp.bfloat16, start=[300, 0], **f8),
        clustered(4, "fp8_tree", 2, 8, 2, 1, 1024, 64, [1000, 60], tree=BRANCHING, return_lse=True, **f8),
    ]


# Blocks that reach past the cache, a split with nothing to do, rows in more than one tile, nodes in two words.
GPU_TESTS = [
    case("past_the_end", 2, 1, 2, 4, 200, 128, [200, 130], return_lse=True),
    case("gpu_splits", 3, 2, 2, 2, 512, 64, [500, 31, 0], return_lse=True, gpu_blocks={"splits": 3, "stages": 2}),
    case("rows_of_12", 2, 3, 2, 4, 256, 64, [250, 70]),
    case("rows_of_80", 2, 10, 1, 8, 256, 64, [250, 70]),
    case("tree_40", 1, 40, 1, 1, 256, 128, [200], tree=tree_of([-1, *[max(0, i // 2 - 1) for i in range(1, 40)]])),
    case("int8_splits", 2, 1, 2, 4, 1024, 128, [1000, 130], cache=jnp.int8, gpu_blocks={"splits": 3, "stages": 2}),
    case("int8_window", 2, 1, 2, 4, 512, 64, [500, 130], cache=jnp.int8, window=100, sinks=4),
    # Rings that have not come round, or have, or several times; that begin anywhere, or hold nothing.
    case("ring", 4, 1, 2, 4, 128, 128, [100, 128, 1000, 0], start=[0, 64, 928, 0], ring=True, return_lse=True),
    case("ring_past_the_end", 3, 3, 1, 4, 200, 64, [150, 700, 201], start=[40, 501, -5], ring=True, return_lse=True),
    case("ring_window", 2, 8, 2, 2, 320, 64, [500, 90], window=40, position=[492, 80], ring=True),
    case("ring_splits", 3, 1, 2, 8, 512, 128, [999, 60, 512], start=[600, 0, 9], ring=True, gpu_blocks={"splits": 3}),
    case("ring_cluster", 2, 2, 2, 4, 512, 128, [999, 60], ring=True, gpu_blocks={"splits": 4, "cluster": 1}),
    *_clusters(),
]


def _real(name: str, B: int, S: int, T: int = 1, **options: Any) -> Case:
    return case(name, B, T, 8, 8, S, 128, [S] * B, **options)


TIMED = [
    _real("b4_s4096", 4, 4096),
    _real("b16_s4096", 16, 4096),
    _real("b64_s4096", 64, 4096),
    _real("b4_s32768", 4, 32768),
    _real("b8_s4096_int8", 8, 4096, cache=jnp.int8),
    _real("b8_s4096", 8, 4096),
    _real("b8_s4096_fp8", 8, 4096, cache=jnp.float8_e4m3fn),
    _real("b8_s4096_t8", 8, 4096, T=8),
    _real("b8_s4096_tree8", 8, 4096, T=8, tree=BRANCHING),
    case("ragged", 16, 1, 8, 8, 8192, 128, [8192, 100, 4000, 17, 6000, 512, 2048, 8000] * 2),
    _real("window_1024", 16, 8192, window=1024, sinks=4),
]

GPU_TIMED = [
    *[case(f"g4_b{B}_s8192", B, 1, 8, 4, 8192, 128, [8192] * B) for B in (1, 4, 16, 64)],
    *[case(f"g4_b{B}_s8192_int8", B, 1, 8, 4, 8192, 128, [8192] * B, cache=jnp.int8) for B in (1, 4, 16, 64)],
    *[case(f"g4_b{B}_s32768", B, 1, 8, 4, 32768, 128, [32768] * B) for B in (1, 4, 16)],
    *[case(f"g4_b{B}_s32768_int8", B, 1, 8, 4, 32768, 128, [32768] * B, cache=jnp.int8) for B in (1, 4, 16)],
    *[case(f"g4_b{B}_ring_128", B, 1, 8, 4, 128, 128, [8192] * B, start=[8128] * B, ring=True) for B in (1, 16, 64)],
    case("g4_b16_s8192_fp8", 16, 1, 8, 4, 8192, 128, [8192] * 16, cache=jnp.float8_e4m3fn),
    *TIMED,
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try: a copy of 256 KiB to 2 MiB, in two to four buffers."""
    del chip
    found = []
    for slots in (256, 512, 1024):
        for buffers in (2, 3):
            found.append({"slots": slots, "heads": 8, "buffers": buffers, "splits": 1})
    return found


def gpu_candidates(case: Case) -> list[dict[str, int]]:
    """Return blocks to try on a GPU: with one to four resident on a processor; splits fill all processors as before."""
    found = [{"slots": 64, "stages": stages} for stages in (2, 3, 4)] + [{"overlap": 0}]
    found += [{"slots": 128, "stages": stages} for stages in (2, 3)]
    if "k_scale" in case.shapes:  # 64 slots are widened first, more are multiplied as they are
        found = [{"slots": 128, "stages": stages} for stages in (2, 3, 4)] + [{"slots": 256, "stages": 2}]
    rows = case.shapes["q"].shape[0]
    if rows == 1:  # fewer parts to be merged
        found += [{"splits": 16}]
    return found + _clusters_of(rows, "k_scale" in case.shapes)


def _clusters_of(rows: int, quantized: bool) -> list[dict[str, int]]:
    """Return blocks whose splits are a cluster, one resident on a processor or two."""
    if rows > 4:
        return [{"cluster": 1}]
    sizes = ((128, 3), (256, 2), (256, 3)) if quantized else ((64, 2), (64, 3), (64, 4), (128, 2), (192, 2))
    return [
        {"splits": splits, "cluster": 1, "slots": slots, "stages": stages}
        for splits in ((8,) if rows == 1 else (4, 8))
        for slots, stages in sizes
    ]


def gpu_class(q: Any, k: Any, *_: Any, **__: Any) -> dict[str, int | str]:
    """Return the key of the table of a GPU's blocks."""
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    return block_class(k.dtype, B * K, N // K * T, S, H)


KERNEL = Kernel(
    "decode_attention",
    tpu,
    reference,
    TESTS,
    TIMED,
    candidates,
    shape_class,
    gpu=gpu,
    gpu_candidates=gpu_candidates,
    gpu_class=gpu_class,
    gpu_peers=peers.PEERS,
    gpu_timed=GPU_TIMED,
    gpu_tests=GPU_TESTS,
)
