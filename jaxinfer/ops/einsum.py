"""The one contraction that every linear layer uses, for plain and for quantized kernels."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from jaxinfer.ops import cpu_kernels
from jaxinfer.ops.divided_einsum import divided, over_tokens
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_einsum import kernel_product, worth
from jaxinfer.ops.placement import Names, free_axes
from jaxinfer.ops.quantized import RUN, Packed, Quantized, codes, dequantize, is_quantized

_FEW_ROWS = 16  # up to which float x code is faster row by row than after making the weight float


def einsum(
    eq: str,
    x: Float[Array, "..."],
    kernel: Float[Array, "..."] | Quantized,
    implementation: Implementation | None = None,
    axes: Names | None = None,
) -> Float[Array, "..."]:
    """Return `jnp.einsum(eq, x, kernel)` accumulated in float32 and rounded once to x's dtype.

    `eq` is `"bt" + in letters, kernel letters -> "bt" + out letters`, where the kernel is stored inputs first
    (`"btd,dnh->btnh"`) or outputs first (`"btd,vd->btv"`). A quantized kernel is read as it is stored; `implementation`
    says by what. `axes` has the logical name of each kernel axis: under a mesh a kernel is divided by them.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
        ValueError: `eq` is not of that form.
    """
    product = functools.partial(einsum, eq, implementation=implementation)
    whole = not is_quantized(kernel)
    y = over_tokens(product, x, kernel) if whole else divided(product, eq, x, kernel, axes, implementation)
    if y is not None:
        return y
    rows, out_shape = flatten(eq, x, kernel.shape)
    if is_quantized(kernel):
        first = inputs_first(eq)
        pallas = functools.partial(kernel_product, first=first)
        implementation = worth(implementation, rows, kernel)
        y = choose(implementation, pallas, lambda x, w: _weight_only(x, w, first).astype(x.dtype), rows, kernel)
    elif implementation == "pallas":
        raise NotImplementedError("implementation='pallas': a product with a float kernel is XLA's")
    else:
        # One plain product: with several contracted axes XLA's CPU backend copies the whole kernel first.
        first = inputs_first(eq)
        y = dot(rows, kernel.reshape(rows.shape[1], -1) if first else kernel.reshape(-1, rows.shape[1]), first)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


def _weight_only(rows: Float[Array, "M I"], kernel: Quantized, first: bool) -> Float[Array, "M O"]:
    """Return the product with the weight that a leaf stands for."""
    inner = rows.shape[1]

    def contract(rows: Array, kernel: Quantized) -> Array:
        by_output = kernel.scale.size == math.prod(kernel.shape) // inner and getattr(kernel, "offset", None) is None
        if by_output and not first:
            # One scale an output can wait until after the product, which then reads the codes and nothing else.
            y = dot(rows, codes(kernel).astype(rows.dtype).reshape(-1, inner), False)
            return y * kernel.scale.reshape(1, -1).astype(y.dtype)
        weight = dequantize(kernel, rows.dtype)
        return dot(rows, weight.reshape(inner, -1) if first else weight.reshape(-1, inner), first)

    qtype = kernel.qtype if isinstance(kernel, Packed) else kernel.qvalue.dtype.name
    groups = kernel.scale.size * inner // math.prod(kernel.shape)
    whole_runs = qtype == "int8" or (inner // groups % RUN == 0 and kernel.shape[-1] % RUN == 0)
    stored = kernel.scale.dtype in (jnp.float32, jnp.float16)
    if first or qtype not in ("int8", "int4", "uint4") or not whole_runs or not stored or rows.dtype != jnp.float32:
        return contract(rows, kernel)

    def native(rows: Array, kernel: Quantized) -> Array:
        values = kernel.values if isinstance(kernel, Packed) else kernel.qvalue
        outputs = math.prod(kernel.shape) // inner
        tiles = [None if t is None else t.reshape(outputs, -1) for t in (kernel.scale, getattr(kernel, "offset", None))]
        return cpu_kernels.weight_only(rows, values.reshape(outputs, -1), *tiles, qtype=qtype)

    return on_cpu(native, contract, _FEW_ROWS, rows, kernel)


def on_cpu(
    native: Callable[..., Array], contract: Callable[..., Array], most: int | None, rows: Array, *kernel: Any
) -> Array:
    """Return the product by machine code where it runs on a CPU with at most `most` rows (None: any), else by XLA."""
    # Machine code is called on one device: under a mesh XLA would gather for it what the devices have.
    if (most is None or rows.shape[0] <= most) and cpu_kernels.available() and not free_axes():
        return jax.lax.platform_dependent(rows, *kernel, cpu=native, default=contract)
    return jax.lax.platform_dependent(
        rows, *kernel, cpu=lambda rows, *kernel: contract(rows, *_late(rows, kernel)), default=contract
    )


def _late(rows: Float[Array, "M I"], kernel: Any) -> Any:
    """Return the kernel as something that depends on the rows, which it does not.

    XLA's CPU backend makes a float kernel as soon as it can, and so those of all layers at once: as many bytes as the
    model had before it was quantized. (It drops optimization barriers before it decides on the order.)
    """
    never = rows[0, 0] > jnp.inf  # false, of a NaN too; XLA does not know

    def tie(part: Array) -> Array:
        return part + never.astype(part.dtype) if jnp.issubdtype(part.dtype, jnp.integer) else jnp.where(never, 0, part)

    return jax.tree.map(tie, kernel)


def flatten(eq: str, x: Array, kernel_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Return x as rows of inputs, and the shape that follows the rows in the output."""
    contracted = x.ndim - 2
    outputs = kernel_shape[contracted:] if inputs_first(eq) else kernel_shape[: len(kernel_shape) - contracted]
    return x.reshape(-1, math.prod(x.shape[2:])), outputs


def dot(rows: Array, matrix: Array, first: bool, sums: DTypeLike = jnp.float32) -> Array:
    """Return `rows @ matrix` (or its transpose, outputs first) with sums of the given type."""
    contract = functools.partial(
        jax.lax.dot_general,
        dimension_numbers=(((1,), (0 if first else 1,)), ((), ())),
        preferred_element_type=sums,
    )

    def contract_two_rows(rows: Array, matrix: Array) -> Array:
        # XLA's CPU backend runs one row of anything narrower than float32 through a scalar loop, ten times slower.
        return contract(jnp.concatenate([rows, rows]), matrix)[:1]

    if rows.shape[0] == 1 and rows.dtype in (jnp.bfloat16, jnp.int8):
        return jax.lax.platform_dependent(rows, matrix, cpu=contract_two_rows, default=contract)
    return contract(rows, matrix)


@functools.cache
def inputs_first(eq: str) -> bool:
    """Return whether the kernel of `eq` is stored inputs first.

    Raises:
        ValueError: `eq` is not of the form that `einsum` takes.
    """
    parts = re.fullmatch(r"(\w\w)(\w+),(\w+)->\1(\w+)", eq)
    if parts:
        _, inner, kernel, outer = parts.groups()
        if kernel in (inner + outer, outer + inner) and not set(inner) & set(outer):
            return kernel == inner + outer
    raise ValueError(f"eq={eq!r}: must be 'bt<in>,<in><out>->bt<out>' or 'bt<in>,<out><in>->bt<out>'")
