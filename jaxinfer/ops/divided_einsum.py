"""A product with a quantized weight on a mesh: each device multiplies with what it has of the weight."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxinfer.ops.implementation import Implementation
from jaxinfer.ops.placement import Names, Rules, current_rules, first_entry, free_axes
from jaxinfer.ops.quantized import FOUR_BIT, RUN, Packed, Quantized
from pallas_kernels import targets


def divided(
    product: Callable[[Array, Quantized], Array],
    eq: str,
    x: Float[Array, "..."],
    kernel: Quantized,
    axes: Names | None,
    implementation: Implementation | None,
    group: int | None = 1,
) -> Float[Array, "..."] | None:
    """Return `product(x, kernel)`, an einsum of `eq`, from one product a device with its part of the kernel.

    Where a kernel can't run, or XLA is named, only new tokens are divided so, and None where they are not divided.
    `axes` names the kernel's axes. Where inputs are divided, the devices' products are summed in float32; `group` of
    the flattened inputs (None: all), which are rounded together, must then lie on one device. A mesh axis that divides
    the batch too gathers the kernel's codes.

    Raises:
        NotImplementedError: "pallas" is named, and groups or the tiles that share a scale would be cut.
    """
    if axes is not None and implementation != "xla" and free_axes() and targets.platform() is not None:
        try:
            return _divide(product, eq, x, kernel, axes, group)
        except NotImplementedError:
            if implementation is not None:
                raise
    return over_tokens(product, x, kernel)


def over_tokens(
    product: Callable[[Array, Any], Array], x: Float[Array, "B T ..."], kernel: Any
) -> Float[Array, "B T ..."] | None:
    """Return `product(x, kernel)` from one product of each device's new tokens; None where they are not divided.

    A product flattens rows of tokens, and XLA would gather divided ones for that.
    """
    mesh, rules = free_axes(), current_rules()
    tokens = rules.token_axes(x.shape[1], mesh) if mesh and rules is not None else ()
    if not tokens:
        return None
    along = PartitionSpec(None, tokens)
    divide = jax.shard_map(
        product, in_specs=(along, PartitionSpec()), out_specs=along, axis_names={*tokens}, check_vma=False
    )
    return divide(x, kernel)


def _divide(product, eq, x, kernel, axes, group):
    mesh, rules = free_axes(), current_rules()
    if rules is None:
        raise NotImplementedError(f"a kernel is not divided over mesh axes {', '.join(mesh)} by itself")
    left, outer = eq.split("->")
    inner, letters = left.split(",")
    rows, tokens = first_entry(rules.spec(("batch",), (x.shape[0],), mesh)), rules.token_axes(x.shape[1], mesh)
    mesh = {axis: size for axis, size in mesh.items() if axis not in (*rows, *tokens)}
    specs, over = _kernel_specs(kernel, axes, mesh, rules)
    of = dict(zip(letters, over, strict=True))
    summed = tuple(axis for letter in inner[2:] for axis in of[letter])
    _check_groups([(kernel.shape[letters.index(c)], of[c]) for c in inner[2:]], mesh, group)

    def run(x: Array, kernel: Quantized) -> Array:
        y = product(x, kernel)
        return jax.lax.psum(y.astype(jnp.float32), summed).astype(x.dtype) if summed else y

    return jax.shard_map(
        run,
        in_specs=(PartitionSpec(rows, tokens, *(of[c] or None for c in inner[2:])), specs),
        out_specs=PartitionSpec(rows, tokens, *(of[c] or None for c in outer[2:])),
        check_vma=False,
    )(x, kernel)


def _kernel_specs(
    kernel: Quantized, axes: Names, mesh: Mapping[str, int], rules: Rules
) -> tuple[Any, list[tuple[str, ...]]]:
    """Return the spec of each array of a quantized kernel, and the mesh axes that divide each of its axes.

    Raises:
        NotImplementedError: an array of it can't be divided as the others are.
    """
    sizes = list(kernel.shape)
    packed = isinstance(kernel, Packed) and kernel.qtype in FOUR_BIT
    if packed:  # a run stays whole
        sizes[-1] = sizes[-1] // RUN if sizes[-1] % RUN == 0 else 1
    spec = rules.spec(axes, sizes, mesh)
    over = [first_entry(spec[i : i + 1]) for i in range(len(sizes))]

    def of(part: Array) -> PartitionSpec:
        entries = []
        for size, whole, by in zip(part.shape, kernel.shape, over, strict=True):
            ways = math.prod(mesh[axis] for axis in by)
            if size == 1 and whole > 1:  # one tile: every device has all of it
                entries.append(None)
            elif size % ways:
                raise NotImplementedError(f"{size} tiles along an axis of {whole} over {ways} devices: must divide")
            else:
                entries.append(by or None)
        return PartitionSpec(*entries)

    return jax.tree.map(of, kernel), over


def _check_groups(inputs: list[tuple[int, tuple[str, ...]]], mesh: Mapping[str, int], group: int | None) -> None:
    """Raise NotImplementedError where inputs that are rounded together would lie on several devices."""
    ways = math.prod(mesh[axis] for _, by in inputs for axis in by)
    local = math.prod(size for size, _ in inputs) // ways
    if ways > 1 and (group is None or local % group):
        raise NotImplementedError(f"inputs in groups of {group or 'all'}: a device has {local} of them")
