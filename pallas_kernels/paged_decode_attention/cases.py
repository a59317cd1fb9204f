"""What paged decode attention is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.decode_attention.cases import BRANCHING, gpu_candidates
from pallas_kernels.decode_attention.gpu_rows import block_class
from pallas_kernels.paged_decode_attention import gpu, peers, reference, tpu
from pallas_kernels.paged_decode_attention.tpu import shape_class

F32 = jnp.float32
RACES = ("pages_16", "across_pages", "read_only", "splits", "int8")


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
    dtype: Any = jnp.bfloat16,
    cache: Any = None,
    scales: Any = F32,
    append: bool = True,
    start: list[int] | None = None,
    most: int | None = None,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case whose rows have their pages anywhere; `most` is the number of entries of a row's table."""
    struct = jax.ShapeDtypeStruct
    stored = cache or dtype
    M = most or -(-max(length) // page)
    P = B * M + 4
    numbers = np.random.default_rng(7).permutation(P)[: B * M].astype(np.int32)
    shapes: dict[str, Any] = {
        "q": struct((B, T, K * G, H), dtype),
        "k_pages": struct((P, K, page, H), stored),
        "v_pages": struct((P, K, page, H), stored),
        "table": numbers.reshape(B, M),
        "length": np.array(length, np.int32),
    }
    if cache is not None:
        shapes |= {name: struct((P, K, page), scales) for name in ("k_scale", "v_scale")}
    if append:
        shapes["new"] = {name: struct((B, T, K, H), stored) for name in "kv"}
        if cache is not None:
            shapes["new"] |= {name: struct((B, T, K), scales) for name in ("k_scale", "v_scale")}
    if start is not None:
        shapes["start"] = np.array(start, np.int32)
    live = sum(n - s for n, s in zip(length, start or [0] * B, strict=True))
    size = jnp.dtype(stored).itemsize
    return Case(
        name,
        shapes,
        {"scale": H**-0.5, **options},
        flops=4.0 * live * T * K * G * H,
        bytes=2.0 * live * K * (H * size + (4 if cache is not None else 0)),
        blocks={"slots": 2 * page, "heads": 2, "buffers": 3, "splits": 1} | (blocks or {}),
        gpu_blocks=gpu_blocks,
        donated=("k_pages", "v_pages", "k_scale", "v_scale") if append else (),
        spoil=_spoil,
        races=name in RACES,
    )


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill what is not live with NaN, or the largest code; entries of the table past the length name no page."""
    changed, page = dict(inputs), inputs["k_pages"].shape[2]
    length, table = inputs["length"], inputs["table"]
    B, M = table.shape
    start = inputs.get("start", np.zeros(B, np.int32))
    live = np.zeros((inputs["k_pages"].shape[0], page), bool)
    for b in range(B):
        slots = np.arange(M * page).reshape(M, page)
        live[table[b]] = (slots >= start[b]) & (slots < length[b])
    for name in ("k_pages", "v_pages", "k_scale", "v_scale"):
        if name in inputs:
            x = inputs[name]
            worst = jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 127
            mask = live[:, None, :, None] if x.ndim == 4 else live[:, None]
            changed[name] = jnp.where(mask, x, jnp.asarray(worst, x.dtype))
    changed["table"] = np.where(np.arange(M) * page < length[:, None], table, 10**6).astype(np.int32)
    return changed


TESTS = [
    case("pages_16", 3, 1, 2, 2, 16, 64, [1, 16, 40], dtype=F32, return_lse=True),
    case("read_only", 2, 2, 2, 2, 8, 64, [33, 7], dtype=F32, append=False),
    case("empty_row", 3, 1, 1, 8, 32, 128, [0, 33, 64], dtype=F32, return_lse=True),
    case("across_pages", 2, 4, 2, 1, 16, 80, [34, 66], dtype=F32),
    case("first_tokens", 2, 3, 2, 2, 8, 64, [3, 10], dtype=F32),
    case("starts", 2, 1, 2, 2, 8, 64, [20, 30], start=[9, 29], dtype=F32),
    case("window_sinks", 2, 1, 2, 2, 16, 96, [100, 12], window=20, sinks=4, dtype=F32),
    case("softcap", 1, 2, 4, 1, 8, 256, [17], softcap=4.0, dtype=F32, blocks={"heads": 1}),
    case("tree", 2, 8, 2, 2, 16, 64, [60, 31], tree=BRANCHING, dtype=F32),
    case("splits", 3, 1, 2, 2, 16, 64, [128, 31, 0], dtype=F32, return_lse=True, blocks={"splits": 2}),
    case("bf16", 2, 2, 2, 8, 32, 128, [130, 65]),
    case("int8", 2, 2, 2, 4, 64, 128, [130, 65], cache=jnp.int8),
    case("fp8", 2, 1, 2, 4, 32, 128, [130, 65], cache=jnp.float8_e4m3fn, scales=jnp.bfloat16),
]
_CLUSTER = {"cluster": 1, "stages": 2}
GPU_TESTS = [
    case("gpu_splits", 3, 1, 2, 4, 64, 128, [700, 31, 0], return_lse=True, gpu_blocks={"splits": 3, "stages": 2}),
    case("pages_128", 2, 1, 2, 4, 128, 128, [300, 129]),
    case("int8_128", 2, 1, 2, 4, 128, 64, [300, 129], cache=jnp.int8, gpu_blocks={"splits": 2}),
    case("cluster", 3, 1, 2, 4, 64, 128, [700, 31, 0], return_lse=True, gpu_blocks=_CLUSTER | {"splits": 4}),
    case("cluster_tree", 2, 8, 2, 2, 16, 64, [600, 31], tree=BRANCHING, gpu_blocks=_CLUSTER | {"splits": 16}),
    case("cluster_int8", 2, 1, 2, 4, 64, 128, [1300, 65], cache=jnp.int8, gpu_blocks=_CLUSTER | {"splits": 8}),
    case("cluster_fp8", 2, 1, 2, 4, 16, 64, [700, 0], cache=jnp.float8_e4m3fn, gpu_blocks=_CLUSTER | {"splits": 2}),
]


def _real(name: str, B: int, S: int, page: int, **options: Any) -> Case:
    return case(name, B, 1, 8, 8, page, 128, [S] * B, **options)


TIMED = [
    _real("b8_s4096_p16", 8, 4096, 16),
    _real("b8_s4096_p64", 8, 4096, 64),
    _real("b8_s4096_p64_read", 8, 4096, 64, append=False),
    _real("b8_s4096_p128", 8, 4096, 128),
    _real("b8_s4096_p128_int8", 8, 4096, 128, cache=jnp.int8),
    case("ragged_p64", 16, 1, 8, 8, 64, 128, [4096, 100, 4000, 17, 3000, 512, 2048, 4001] * 2),
]
GPU_TIMED = [
    *[
        case(f"g4_b{B}_s{S}_p{page}", B, 1, 8, 4, page, 128, [S] * B, append=False)
        for page in (64, 16)
        for B, S in ((1, 8192), (16, 8192), (64, 8192), (4, 32768))
    ],
    *[
        case(f"g4_b{B}_s8192_p64_int8", B, 1, 8, 4, 64, 128, [8192] * B, append=False, cache=jnp.int8)
        for B in (1, 16, 64)
    ],
    *TIMED,
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try: a block of 512 or 1024 slots, in two or three buffers."""
    del case, chip
    return [
        {"slots": slots, "heads": 8, "buffers": buffers, "splits": 1} for slots in (512, 1024) for buffers in (2, 3)
    ]


def gpu_class(q: Any, k_pages: Any, *_: Any, table: Any, **__: Any) -> dict[str, int | str]:
    """Return the key of the table of a GPU's blocks."""
    (B, T, N, H), (K, page) = q.shape, k_pages.shape[1:3]
    return block_class(k_pages.dtype, B * K, N // K * T, table.shape[1] * page, H)


KERNEL = Kernel(
    "paged_decode_attention",
    tpu,
    reference,
    TESTS,
    TIMED,
    candidates,
    shape_class,
    peers.PEERS,
    gpu=gpu,
    gpu_candidates=gpu_candidates,
    gpu_class=gpu_class,
    gpu_peers={"xla": peers.xla},
    gpu_timed=GPU_TIMED,
    gpu_tests=GPU_TESTS,
)
