"""What the quantized product is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel, Peer
from pallas_kernels.quantized_matmul import gpu, reference, tpu
from pallas_kernels.quantized_matmul.gpu_plan import MOST_ROWS, block_class
from pallas_kernels.quantized_matmul.reference import FOUR_BIT, codes, dequantize
from pallas_kernels.quantized_matmul.tpu import shape_class

F32, BF16 = jnp.float32, jnp.bfloat16
RACES = ("int8_rows", "int4_groups_128_bf16")
STORED = {"int8": jnp.int8, "float8_e4m3fn": jnp.float8_e4m3fn}


def case(
    name: str,
    M: int,
    I: int,
    O: int,
    qtype: str,
    group: int | None = None,
    *,
    dtype: Any = BF16,
    scales: Any = F32,
    offset: bool = False,
    x: np.ndarray | None = None,
    values: np.ndarray | None = None,
    blocks: dict[str, int] | None = None,
    gpu_blocks: dict[str, int] | None = None,
    **options: Any,
) -> Case:
    """Return a case; `group` is None for one scale an output, `scales` the dtype of scale and offset."""
    struct = jax.ShapeDtypeStruct
    G = I // (group or I)
    held = I // 2 if qtype in FOUR_BIT else I
    shapes: dict[str, Any] = {
        "x": struct((M, I), dtype) if x is None else x,
        "values": struct((O, held), STORED.get(qtype, jnp.uint8)) if values is None else values,
        "scale": struct((G, O), scales),
    }
    if offset:  # as small as eight steps of a scale: a larger one would drown the codes
        shapes["offset"] = np.random.default_rng(1).uniform(-0.1, 0.1, (G, O)).astype(scales)
    size = jnp.dtype(dtype).itemsize
    return Case(
        name,
        shapes,
        {"qtype": qtype, **options},
        flops=2.0 * M * I * O,
        bytes=1.0 * O * held + (2 if offset else 1) * G * O * jnp.dtype(scales).itemsize + M * (I + O) * size,
        int8=options.get("activations") == "int8",
        races=name in RACES,
        blocks={"rows": 64, "outputs": 128, "copies": 2, "lanes": 128} | (blocks or {}),
        gpu_blocks=gpu_blocks,
    )


def _outlier(M: int, I: int) -> np.ndarray:
    """Return numbers of one sign, with an input a thousand times as large as the rest."""
    x = np.abs(np.random.default_rng(2).standard_normal((M, I))).astype(np.float32)
    x[:, 5] *= 1000
    return x


def _fp8_bits(O: int, I: int) -> np.ndarray:
    """Return the bits of every float8_e4m3fn number but NaN."""
    bits = np.random.default_rng(3).integers(0, 255, (O, I))
    return np.where(bits & 127 == 127, 0, bits).astype(np.uint8)


A8 = {"activations": "int8"}
TESTS = [
    case("int8", 1, 96, 60, "int8", dtype=F32),
    case("int8_odd", 7, 256, 63, "int8", scales=BF16),
    case("int8_rows", 63, 320, 200, "int8", dtype=F32, blocks={"rows": 32}),
    case("int8_groups_32", 3, 320, 200, "int8", 32, dtype=F32),
    case("int8_groups_128", 3, 256, 200, "int8", 128, offset=True),
    case("fp8", 3, 256, 200, "float8_e4m3fn", dtype=F32),
    case("fp8_bits", 7, 256, 63, "float8_e4m3fn", values=_fp8_bits(63, 256)),
    case("int4_groups_32", 3, 320, 200, "int4", 32, dtype=F32),
    case("int4_groups_64", 7, 320, 63, "int4", 64, scales=BF16),
    case("int4_groups_128", 1, 256, 200, "int4", 128, dtype=F32, scales=BF16),
    case("int4_groups_128_bf16", 63, 512, 384, "int4", 128, blocks={"lanes": 256}),
    case("int4_rows", 20, 512, 200, "int4", 64, blocks={"rows": 8, "lanes": 64}),
    case("int4_halves_32", 3, 320, 200, "int4", 32, dtype=F32, blocks={"lanes": 64}),
    case("int4_halves_64", 7, 448, 63, "int4", 64, dtype=F32, blocks={"lanes": 64}),
    case("int4_halves_128", 63, 512, 384, "int4", 128, blocks={"lanes": 64}),
    case("int4_halves_64_turns", 3, 2 * 32 * 128 + 64, 130, "int4", 64, scales=BF16, blocks={"lanes": 64}),
    case("uint4_halves_128", 1, 384, 200, "uint4", 128, offset=True, dtype=F32, blocks={"lanes": 64}),
    case("int4", 3, 320, 60, "int4", dtype=F32),
    case("int4_96", 7, 96, 200, "int4"),
    case("int4_outlier", 3, 512, 200, "int4", 128, x=_outlier(3, 512), dtype=F32),
    case("int4_outlier_bf16", 3, 512, 200, "int4", 128, x=_outlier(3, 512).astype(BF16)),
    case("uint4_offset", 3, 256, 200, "uint4", 64, offset=True, dtype=F32),
    case("uint4_offset_whole", 7, 320, 200, "uint4", offset=True, dtype=F32),
    case("uint4_offset_bf16", 7, 256, 63, "uint4", 32, offset=True, scales=BF16),
    case("w8a8", 1, 96, 60, "int8", dtype=F32, **A8),
    case("w8a8_bf16", 63, 256, 200, "int8", **A8),
    case("w8a8_groups_128", 7, 256, 200, "int8", 128, dtype=F32, **A8),
    case("w4a8_groups_64", 3, 320, 63, "int4", 64, dtype=F32, **A8),
    case("w4a8_offset", 3, 320, 63, "uint4", offset=True, dtype=F32, **A8),
]


W16, W4 = {"scales": BF16}, {"scales": BF16, "offset": True}
GPU_TESTS = [  # more than 64 rows: rows and outputs that fill no block, groups of every kind
    case("many_int8", 200, 256, 320, "int8"),
    case("many_int8_groups_32", 130, 192, 128, "int8", 32, **W16),
    case("many_int8_groups_64", 65, 256, 64, "int8", 64),
    case("many_fp8", 100, 128, 192, "float8_e4m3fn", **W16),
    case("many_int4", 100, 384, 320, "int4"),
    case("many_int4_groups_32", 130, 384, 192, "int4", 32, **W16),
    case("many_int4_groups_128", 300, 512, 448, "int4", 128, **W16),
    case("many_int4_groups_128_f32", 100, 512, 128, "int4", 128),
    case("many_uint4_offset", 90, 256, 192, "uint4", 64, **W4),
    case("many_uint4_offset_whole", 90, 256, 192, "uint4", offset=True),
    case("many_splits", 80, 1408, 128, "int8", 128, gpu_blocks={"splits": 3, "outputs": 64, "stages": 3}, **W16),
    case("many_splits_int4", 80, 1408, 192, "int4", 128, gpu_blocks={"splits": 2, "outputs": 128}, **W16),
    case("many_outputs_256", 140, 256, 320, "int4", 64, gpu_blocks={"outputs": 256}, **W16),
    case("many_rows_256", 600, 128, 192, "int8", gpu_blocks={"outputs": 128, "rows": 256, "stages": 2}),
]


def _real(M: int, O: int, qtype: str, group: int | None = None, **options: Any) -> Case:
    form = ("w4" if qtype in FOUR_BIT else "fp8" if qtype == "float8_e4m3fn" else "w8") + (
        "a8" if "activations" in options else "a16"
    )
    return case(f"{form}_m{M}_o{O}", M, 4096, O, qtype, group, **options)


SIZES = (*((M, 4096) for M in (1, 8, 16, 32, 64, 256)), *((M, 14336) for M in (8, 32)))
TIMED = [
    *(
        _real(M, O, qtype, group, **options)
        for qtype, group, options in (("int8", None, {}), ("int4", 128, {"scales": BF16}), ("int8", None, A8))
        for M, O in SIZES
    ),
    case("w4a16_f32scale_m8_o4096", 8, 4096, 4096, "int4", 128),
    case("w4a16_g32_m8_o4096", 8, 4096, 4096, "int4", 32, scales=BF16),
    case("w4a16_g64_m32_i8192_o3584", 32, 8192, 3584, "int4", 64, scales=BF16),
    case("w4a16_whole_m8_o4096", 8, 4096, 4096, "int4"),
    case("w4a16_offset_m8_o4096", 8, 4096, 4096, "uint4", 128, scales=BF16, offset=True),
    case("w8a16_down_m8", 8, 14336, 4096, "int8"),
    case("w4a16_down_m8", 8, 14336, 4096, "int4", 128, scales=BF16),
    _real(8, 4096, "float8_e4m3fn"),
]

FORMS = {
    "w8a16": ("int8", None, {}),
    "w4a16": ("int4", 128, {"scales": BF16}),
    "fp8a16": ("float8_e4m3fn", None, {}),
    "w8a8": ("int8", None, A8),
}
GPU_SIZES = [
    *((form, M, I, O) for form in FORMS for I, O in ((4096, 14336), (14336, 4096)) for M in (1, 8, 16)),
    # The others of Llama-3-8B: q, k and v in one, a layer's output, the two ups in one, and the vocabulary.
    *((form, 1, 4096, O) for form in ("w8a16", "w4a16") for O in (4096, 6144, 28672, 128256)),
    *((form, 16, 4096, O) for form in ("w8a16", "w4a16") for O in (4096, 6144, 28672)),
]
MANY = [
    *((form, M, 4096, 14336) for form in ("w8a16", "w4a16") for M in (64, 256, 1024)),
    *((form, 1024, 14336, 4096) for form in ("w8a16", "w4a16")),
]
GPU_TIMED = [
    case(f"{form}_m{M}_i{I}_o{O}", M, I, O, FORMS[form][0], FORMS[form][1], **FORMS[form][2])
    for form, M, I, O in (*GPU_SIZES, *MANY)
]


def candidates(case: Case, chip: str) -> list[dict[str, int]]:
    """Return blocks to try: four copies of 64 to 256 KiB or more a step."""
    del chip
    rows = 64 if case.shapes["x"].shape[0] <= 64 else 128
    lanes = (64, 128) if case.options["qtype"] in FOUR_BIT else (128,)
    return [
        {"rows": rows, "outputs": outputs, "copies": 4, "lanes": width}
        for outputs in (128, 256, 512)
        for width in lanes
    ]


def gpu_candidates(case: Case) -> list[dict[str, int]]:
    """Return blocks to try: one to four a processor, with 8 to 32 KiB a step and 48 to 100 KiB on the way to each.

    Of many rows those of the kernel for them, which those of 64 are worth, too.
    """
    M, (O, held) = case.shapes["x"].shape[0], case.shapes["values"].shape
    found: list[dict[str, int]] = [] if M < MOST_ROWS or case.int8 else _of_many(M)
    if M > MOST_ROWS:
        return found
    for outputs, lines, deep, stages, blocks in (
        (64, 2, 4, 4, 3), (128, 1, 2, 3, 4), (128, 1, 2, 4, 3), (64, 1, 2, 6, 4), (32, 2, 4, 6, 4), (32, 4, 4, 3, 4),
        (16, 4, 4, 6, 2),
    ):  # fmt: skip
        steps = -(-held // (lines * 128))
        each = -(-steps // max(1, min(8, steps, blocks * 132 // -(-O // outputs))))
        stages = min(stages, each) if M <= 8 else min(stages, each, 4)
        blocks = {"outputs": outputs, "lines": lines, "deep": deep, "stages": stages, "splits": -(-steps // each)}
        if blocks not in found:
            found.append(blocks)
    found += [{**blocks, "cluster": 1} for blocks in found[1:2] if blocks["splits"] > 1]
    return [*found, *({"outputs": 0, "lines": 2, "deep": 4, "stages": stages, "splits": 1} for stages in (2, 3))]


def _of_many(M: int) -> list[dict[str, int]]:
    """Return blocks of 64 to 256 outputs, with as much shared memory as two of them or one may have."""
    sizes = (
        ((128, 64, 4), (256, 64, 4), (64, 64, 4)) if M <= MOST_ROWS else ((256, 128, 4), (128, 128, 4), (128, 256, 2))
    )
    splits = (1, 2, 4) if M <= MOST_ROWS else (1,)
    return [
        {"outputs": outputs, "rows": rows, "stages": stages, "splits": n}
        for outputs, rows, stages in sizes
        for n in splits
    ]


def _xla(x, values, scale, *, qtype, offset=None, activations=None, blocks=None):
    """Return the product as XLA makes it of the plain formula in x's dtype."""
    del blocks
    if activations == "int8":
        peak = jnp.abs(x.astype(F32)).max(axis=1, keepdims=True)
        step = jnp.where(peak > 0, peak / 127.0, 1.0)
        rounded = jnp.round(x.astype(F32) / step).astype(jnp.int8)
        y = jnp.einsum("mi,oi->mo", rounded, values, preferred_element_type=jnp.int32)
        return (y.astype(F32) * step * scale.astype(F32)).astype(x.dtype)
    if scale.shape[0] == 1 and offset is None:
        y = jnp.einsum("mi,oi->mo", x, codes(values, qtype).astype(x.dtype), preferred_element_type=F32)
        return (y * scale.astype(F32)).astype(x.dtype)
    weight = dequantize(values, scale, offset, qtype).astype(x.dtype)
    return jnp.einsum("mi,oi->mo", x, weight, preferred_element_type=F32).astype(x.dtype)


def _bf16(x, values, scale, **_):
    """Return a product of the same shape with a bfloat16 weight, which has two or four times the bytes."""
    weight = jax.lax.bitcast_convert_type(jnp.zeros((values.shape[0], x.shape[1]), jnp.uint16), BF16)
    return jnp.einsum("mi,oi->mo", x.astype(BF16), weight, preferred_element_type=F32).astype(x.dtype)


def _widened(x, values, scale, *, qtype, offset=None, **_):
    """Return x and the weight in bfloat16."""
    return x, dequantize(values, scale, offset, qtype).astype(BF16)


def _float_product(x, weight):
    """Return the product with it, as XLA makes it."""
    return jnp.einsum("mi,oi->mo", x, weight, preferred_element_type=F32).astype(x.dtype)


def _bf16_bytes(case: Case) -> float:
    """Return the bytes of that product."""
    M, I = case.shapes["x"].shape
    O = case.shapes["values"].shape[0]
    return 2.0 * (O * I + M * (I + O))


KERNEL = Kernel(
    "quantized_matmul", tpu, reference, TESTS, TIMED, candidates, shape_class, {"xla": _xla, "bf16": _bf16},
    {"bf16": _bf16_bytes}, gpu=gpu, gpu_candidates=gpu_candidates, gpu_class=block_class,
    gpu_peers={"xla": _xla, "bf16": Peer(_widened, _float_product)}, gpu_timed=GPU_TIMED, gpu_tests=GPU_TESTS,
)  # fmt: skip
