"""What the norm is tested and timed on."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.case import Case, Kernel
from pallas_kernels.rms_norm import gpu, reference

BF16 = jnp.bfloat16


def case(name: str, M: int, D: int, *, add: bool = True, dtype: Any = BF16) -> Case:
    """Return a case of M rows of D numbers; with `add` the sum with another array is wanted as well."""
    row = jax.ShapeDtypeStruct((M, D), dtype)
    shapes = {"x": row, "scale": jax.ShapeDtypeStruct((D,), jnp.float32)} | ({"add": row} if add else {})
    moved = M * D * dtype(0).itemsize * (4 if add else 2) + 4 * D
    return Case(name, shapes, {"eps": 1e-5}, flops=4.0 * M * D, bytes=float(moved))


TESTS = [
    case("one_row", 1, 4096),
    case("alone", 3, 1024, add=False),
    case("odd_width", 2, 640),
    case("float16", 16, 2048, dtype=jnp.float16),
    case("narrow", 5, 128, add=False),
    case("wide", 2, 8192),
]
TIMED = [
    case("m1_d4096", 1, 4096),
    case("m1_d4096_alone", 1, 4096, add=False),
    case("m16_d4096", 16, 4096),
    case("m64_d8192", 64, 8192),
]


KERNEL = Kernel("rms_norm", None, reference, TESTS, TIMED, None, None, gpu=gpu, gpu_peers={"xla": reference})
