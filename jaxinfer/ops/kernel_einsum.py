"""Products with quantized weights by the kernels: codes are read from HBM as they are stored."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.ops.quantized import FOUR_BIT, RUN, Packed, Quantized
from pallas_kernels import quantized_matmul, targets

_ROWS_OF_BYTES = 64  # XLA multiplies codes of a byte as they lie: at 256 rows in 0.7 to 1.0 of the kernel's time
_ROWS_OF_FOUR_BITS = 256  # of four bits it writes a float weight to HBM first


def worth(
    implementation: str | None, rows: Float[Array, "M I"], kernel: Quantized, integers: bool = False
) -> str | None:
    """Return the implementation that is named, or "xla" where it takes less time for this many rows than the kernel.

    By static estimates of 4096 x 4096 weights: with many rows the products take the time, and not the codes' bytes. A
    GPU's kernel of many rows has not been timed. `integers`: the product is one of int8 by int8, with one scale a row.
    """
    if targets.platform() == "cuda":
        most = 0 if integers else _ROWS_OF_BYTES  # XLA's takes 0.86 to 0.94 of the kernel's time on an H100
    elif isinstance(kernel, Packed):
        most = _ROWS_OF_FOUR_BITS if kernel.qtype in FOUR_BIT else _ROWS_OF_BYTES
    else:
        most = _ROWS_OF_BYTES if kernel.qvalue.dtype == jnp.int8 else 0  # XLA widens fp8 in 0.85 to 0.93 of its time
    return "xla" if implementation is None and rows.shape[0] > most else implementation


def kernel_product(rows: Float[Array, "M I"], kernel: Quantized, *, first: bool, **options: Any) -> Float[Array, "M O"]:
    """Return `rows @ weight^T` for a weight stored outputs first; `options` are the kernel's.

    Raises:
        NotImplementedError: the weight lies inputs first, or in a form that the kernel does not read.
    """
    if first:
        raise NotImplementedError("a quantized weight stored inputs first: the kernel reads outputs first")
    packed = isinstance(kernel, Packed)
    if packed and kernel.shape[-1] % RUN:
        raise NotImplementedError(f"packed rows of {kernel.shape[-1]} entries: the kernel reads whole runs of {RUN}")
    values = kernel.values if packed else kernel.qvalue
    outputs = math.prod(kernel.shape) // rows.shape[1]
    tiles = [None if t is None else _tiles(t, outputs) for t in (kernel.scale, getattr(kernel, "offset", None))]
    return targets.kernel(quantized_matmul)(
        rows,
        values.reshape(outputs, -1),
        tiles[0],
        offset=tiles[1],
        qtype=kernel.qtype if packed else values.dtype.name,
        **options,
    )


def _tiles(x: Float[Array, "..."], outputs: int) -> Float[Array, "G O"]:
    """Return scales or offsets as the kernel reads them; float16 is no type of its own there."""
    return x.reshape(outputs, -1).astype(jnp.bfloat16 if x.dtype == jnp.bfloat16 else jnp.float32).T
