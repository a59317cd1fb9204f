"""The one contraction that every linear layer uses, for plain and for quantized kernels."""

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.ops import cpu_kernels
from jaxinfer.ops.quantized import RUN, Packed, Quantized, codes, dequantize, is_quantized

_FEW_ROWS = 16  # up to which float x code is faster row by row than after making the weight float

_FEW_ROWS_OF_INT4 = 32  # the same for int8 x of 4-bit codes


def einsum(eq: str, x: Float[Array, "..."], kernel: Float[Array, "..."] | Quantized) -> Float[Array, "..."]:
    """Return `jnp.einsum(eq, x, kernel)` accumulated in float32 and rounded once to x's dtype.

    `eq` is `"bt" + in letters, kernel letters -> "bt" + out letters`, where the kernel is stored inputs first
    (`"btd,dnh->btnh"`) or outputs first (`"btd,vd->btv"`). A quantized kernel is read as it is stored.

    Raises:
        ValueError: `eq` is not of that form.
    """
    rows, out_shape = _flatten(eq, x, kernel.shape)
    if is_quantized(kernel):
        y = _weight_only(rows, kernel, inputs_first(eq))
    else:
        # One plain product: with several contracted axes XLA's CPU backend copies the whole kernel first.
        first = inputs_first(eq)
        y = _dot(rows, kernel.reshape(rows.shape[1], -1) if first else kernel.reshape(-1, rows.shape[1]), first)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


def einsum_int8(eq: str, x: Float[Array, "..."], kernel: Quantized, group: int | None = None) -> Float[Array, "..."]:
    """Return `einsum(eq, x, kernel)` with every token of x rounded to int8 too, so that the product is of integers.

    A token has one scale, its largest magnitude over 127, or one for each `group` of its flattened inputs. Sums are
    int32 within a group; they are scaled by the token's scales and the kernel's channels.

    Raises:
        ValueError: the kernel is not int8 with one scale for each output, stored outputs first, or `group` does not
            divide the inputs.
    """
    rows, out_shape = _flatten(eq, x, kernel.shape)
    weight = codes(kernel).reshape(-1, rows.shape[1])
    if inputs_first(eq) or weight.dtype != jnp.int8 or kernel.scale.size != weight.shape[0]:
        raise ValueError("an int8 product needs an int8 kernel, outputs first, with one scale for each output")
    scale = kernel.scale.reshape(-1).astype(jnp.float32)

    def contract(rows: Array, weight: Array, scale: Array) -> Array:
        values, row_scale = quantize_rows(rows, group)
        return sum_groups(lambda x, w: _dot(x, w, False, jnp.int32), values, row_scale, weight) * scale

    operands = (rows.astype(jnp.float32), weight, scale)
    if group is None or group % 16 == 0:
        y = _on_cpu(functools.partial(cpu_kernels.int8_matmul, group=group), contract, None, *operands)
    else:
        y = contract(*operands)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


def einsum_int4_int8(eq: str, x: Float[Array, "..."], kernel: Quantized) -> Float[Array, "..."]:
    """Return `einsum(eq, x, kernel)` of a 4-bit kernel with x rounded to int8, a scale for each run of 32 inputs.

    On a CPU a few rows are integer products within a run. Elsewhere the rounded x meets the weight in floats: the same
    numbers, without the speed.

    Raises:
        ValueError: the kernel is not 4-bit and outputs first, or 32 does not divide its groups.
    """
    rows, out_shape = _flatten(eq, x, kernel.shape)
    inner, outputs = rows.shape[1], math.prod(out_shape)
    group = inner * outputs // kernel.scale.size
    if inputs_first(eq) or not isinstance(kernel, Packed) or kernel.qtype not in ("int4", "uint4") or group % RUN:
        raise ValueError("an int4 x int8 product needs a 4-bit kernel, outputs first, in groups of a multiple of 32")

    def contract(rows: Array, kernel: Packed) -> Array:
        values, scale = quantize_rows(rows, RUN)
        rounded = (values.reshape(*scale.shape, RUN) * scale[:, :, None]).reshape(rows.shape)
        return _dot(rounded, dequantize(kernel, jnp.float32).reshape(-1, inner), False)

    def native(rows: Array, kernel: Packed) -> Array:
        tiles = [None if t is None else t.reshape(outputs, -1) for t in (kernel.scale, kernel.offset)]
        return cpu_kernels.q4_matmul(rows, kernel.values.reshape(outputs, -1), *tiles, qtype=kernel.qtype)

    runs = group // RUN
    taken = kernel.scale.dtype in (jnp.float32, jnp.float16) and kernel.shape[-1] % RUN == 0
    most = _FEW_ROWS_OF_INT4 if taken and (runs <= 2 or runs % 4 == 0) else 0
    y = _on_cpu(native, contract, most, rows.astype(jnp.float32), kernel)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


def quantize_rows(rows: Float[Array, "M I"], group: int | None = None) -> tuple[Array, Float[Array, "M G"]]:
    """Return each row in int8 and its scales: the largest magnitude of each group of inputs over 127.

    Raises:
        ValueError: `group` does not divide the inputs.
    """
    group = rows.shape[1] if group is None else group
    if rows.shape[1] % group:
        raise ValueError(f"group={group}: does not divide {rows.shape[1]} inputs")
    parts = rows.astype(jnp.float32).reshape(rows.shape[0], -1, group)
    scale = jnp.maximum(jnp.abs(parts).max(axis=2), 1e-30) / 127
    return jnp.round(parts / scale[:, :, None]).astype(jnp.int8).reshape(rows.shape), scale


def sum_groups(
    dot: Callable[[Array, Array], Array],
    values: Int[Array, "M I"],
    scale: Float[Array, "M G"],
    weight: Int[Array, "... I"],
) -> Float[Array, "M O"]:
    """Return `sum_g dot(values_g, weight_g) * scale_g`: the integer products of each group of inputs, one at a time."""
    groups = scale.shape[1]
    if groups == 1:
        return dot(values, weight).astype(jnp.float32) * scale
    size = values.shape[1] // groups

    def add(g: Int[Array, ""] | int, total: Array) -> Array:
        x, w = (jax.lax.dynamic_slice_in_dim(a, g * size, size, axis=-1) for a in (values, weight))
        return total + dot(x, w).astype(jnp.float32) * jax.lax.dynamic_slice_in_dim(scale, g, 1, axis=1)

    first = dot(values[:, :size], weight[..., :size]).astype(jnp.float32) * scale[:, :1]
    return jax.lax.fori_loop(1, groups, add, first)


def _weight_only(rows: Float[Array, "M I"], kernel: Quantized, first: bool) -> Float[Array, "M O"]:
    """Return the product with the weight that a leaf stands for."""
    inner = rows.shape[1]

    def contract(rows: Array, kernel: Quantized) -> Array:
        by_output = kernel.scale.size == math.prod(kernel.shape) // inner and getattr(kernel, "offset", None) is None
        if by_output and not first:
            # One scale an output can wait until after the product, which then reads the codes and nothing else.
            y = _dot(rows, codes(kernel).astype(rows.dtype).reshape(-1, inner), False)
            return y * kernel.scale.reshape(1, -1).astype(y.dtype)
        weight = dequantize(kernel, rows.dtype)
        return _dot(rows, weight.reshape(inner, -1) if first else weight.reshape(-1, inner), first)

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

    return _on_cpu(native, contract, _FEW_ROWS, rows, kernel)


def _on_cpu(
    native: Callable[..., Array], contract: Callable[..., Array], most: int | None, rows: Array, *kernel: Any
) -> Array:
    """Return the product by machine code where it runs on a CPU with at most `most` rows, else by XLA."""
    if (most is None or rows.shape[0] <= most) and cpu_kernels.available():
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


def _flatten(eq: str, x: Array, kernel_shape: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """Return x as rows of inputs, and the shape that follows the rows in the output."""
    contracted = x.ndim - 2
    outputs = kernel_shape[contracted:] if inputs_first(eq) else kernel_shape[: len(kernel_shape) - contracted]
    return x.reshape(-1, math.prod(x.shape[2:])), outputs


def _dot(rows: Array, matrix: Array, first: bool, sums: DTypeLike = jnp.float32) -> Array:
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
