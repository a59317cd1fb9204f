"""The contraction of linear layers with x rounded to integers as well as the kernel."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops import cpu_kernels
from jaxinfer.ops.divided_einsum import divided
from jaxinfer.ops.einsum import dot, flatten, inputs_first, on_cpu
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_einsum import kernel_product, worth
from jaxinfer.ops.placement import Names
from jaxinfer.ops.quantized import RUN, Packed, Quantized, codes, dequantize
from pallas_kernels import quantized_matmul, targets

_FEW_ROWS_OF_INT4 = 32  # up to which integer x of 4-bit codes is faster row by row than after making the weight float


def einsum_int8(
    eq: str,
    x: Float[Array, "..."],
    kernel: Quantized,
    group: int | None = None,
    implementation: Implementation | None = None,
    axes: Names | None = None,
) -> Float[Array, "..."]:
    """Return `einsum(eq, x, kernel)` with every token of x rounded to int8 too, so that the product is of integers.

    A token has one scale, its largest magnitude over 127, or one for each `group` of its flattened inputs. Sums are
    int32 within a group; they are scaled by the token's scales and the kernel's channels.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
        ValueError: the kernel is not int8 with one scale for each output, stored outputs first, or `group` does not
            divide the inputs.
    """
    product = functools.partial(_int8, eq, group=group, implementation=implementation)
    y = divided(product, eq, x, kernel, axes, implementation, group)
    if y is not None:
        return y
    return _int8(eq, x, kernel, group, implementation)


def _int8(eq, x, kernel, group, implementation):
    rows, out_shape = flatten(eq, x, kernel.shape)
    weight = codes(kernel).reshape(-1, rows.shape[1])
    if inputs_first(eq) or weight.dtype != jnp.int8 or kernel.scale.size != weight.shape[0]:
        raise ValueError("an int8 product needs an int8 kernel, outputs first, with one scale for each output")
    scale = kernel.scale.reshape(-1).astype(jnp.float32)

    def contract(rows: Array, weight: Array, scale: Array) -> Array:
        values, row_scale = quantize_rows(rows.astype(jnp.float32), group)
        return sum_groups(lambda x, w: dot(x, w, False, jnp.int32), values, row_scale, weight) * scale

    def pallas(rows: Array, weight: Array, scale: Array) -> Array:
        # The kernel rounds x in the groups of the weight's scales: here one scale stands for all groups of an output.
        groups = 1 if group is None else rows.shape[1] // group
        scales = jnp.broadcast_to(scale, (groups, scale.size))
        if targets.platform() != "cuda":  # a GPU's kernel takes rows of 16 bits, and rounds the same numbers
            rows = rows.astype(jnp.float32)
        product = targets.kernel(quantized_matmul)
        return product(rows, weight, scales, qtype="int8", activations="int8").astype(jnp.float32)

    def xla(rows: Array, *operands: Array) -> Array:
        operands = (rows.astype(jnp.float32), *operands)
        if group is None or group % 16 == 0:
            return on_cpu(functools.partial(cpu_kernels.int8_matmul, group=group), contract, None, *operands)
        return contract(*operands)

    implementation = worth(implementation, rows, kernel, integers=group is None)
    y = choose(implementation, pallas, xla, rows, weight, scale)
    return y.astype(x.dtype).reshape(*x.shape[:2], *out_shape)


def einsum_int4_int8(
    eq: str,
    x: Float[Array, "..."],
    kernel: Quantized,
    implementation: Implementation | None = None,
    axes: Names | None = None,
) -> Float[Array, "..."]:
    """Return `einsum(eq, x, kernel)` of a 4-bit kernel with x rounded to int8, a scale for each run of 32 inputs.

    On a CPU a few rows are integer products within a run. Elsewhere the rounded x meets the weight in floats: the same
    numbers, without that speed.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
        ValueError: the kernel is not 4-bit and outputs first, or 32 does not divide its groups.
    """
    product = functools.partial(einsum_int4_int8, eq, implementation=implementation)
    y = divided(product, eq, x, kernel, axes, implementation, RUN)
    if y is not None:
        return y
    rows, out_shape = flatten(eq, x, kernel.shape)
    inner, outputs = rows.shape[1], math.prod(out_shape)
    group = inner * outputs // kernel.scale.size
    if inputs_first(eq) or not isinstance(kernel, Packed) or kernel.qtype not in ("int4", "uint4") or group % RUN:
        raise ValueError("an int4 x int8 product needs a 4-bit kernel, outputs first, in groups of a multiple of 32")

    def rounded(rows: Array) -> Array:
        values, scale = quantize_rows(rows, RUN)
        return (values.reshape(*scale.shape, RUN) * scale[:, :, None]).reshape(rows.shape)

    def contract(rows: Array, kernel: Packed) -> Array:
        return dot(rounded(rows), dequantize(kernel, jnp.float32).reshape(-1, inner), False)

    def native(rows: Array, kernel: Packed) -> Array:
        tiles = [None if t is None else t.reshape(outputs, -1) for t in (kernel.scale, kernel.offset)]
        return cpu_kernels.q4_matmul(rows, kernel.values.reshape(outputs, -1), *tiles, qtype=kernel.qtype)

    def pallas(rows: Array, kernel: Packed) -> Array:
        if targets.platform() != "cuda":
            return kernel_product(rounded(rows.astype(jnp.float32)), kernel, first=False)
        # A GPU's kernel rounds x in the groups of the weight's scales: here some runs share one.
        spread = lambda t: None if t is None else jnp.repeat(t.reshape(outputs, -1), group // RUN, axis=1)  # noqa: E731
        finer = dataclasses.replace(kernel, scale=spread(kernel.scale), offset=spread(kernel.offset))
        return kernel_product(rows, finer, first=False, activations="int8").astype(jnp.float32)

    runs = group // RUN
    taken = kernel.scale.dtype in (jnp.float32, jnp.float16) and kernel.shape[-1] % RUN == 0
    most = _FEW_ROWS_OF_INT4 if taken and (runs <= 2 or runs % 4 == 0) else 0
    implementation = worth(implementation, rows, kernel)

    def xla(rows: Array, kernel: Packed) -> Array:
        return on_cpu(native, contract, most, rows.astype(jnp.float32), kernel)

    y = choose(implementation, pallas, xla, rows, kernel)
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
