"""Rounding a weight to a grid: how its axes are cut into groups, each group's scale, codes, and the leaf of them.

All functions take the inputs (the contracted axes) last and flattened: `[..., I]`; a group is a run of them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float
from qwix import QArray

from jaxinfer.errors import InputError
from jaxinfer.ops.quantized import FOUR_BIT, NF4, Packed, Quantized, pack

_LARGEST = {"int8": 127.0, "int4": 7.0, "nf4": 1.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
_CLIPS = np.linspace(1.0, 0.6, 9)  # shares of the range that a clip search tries
_TINY = 1e-12


def scales(
    w: Float[Array, "*O I"], qtype: str, group: int, clip: bool = False
) -> tuple[Float[Array, "*O G"], Float[Array, "*O G"] | None]:
    """Return each group's scale and, for the asymmetric "uint4", its offset: the weight that code 0 stands for.

    Symmetric: `max |w| / largest code`. Asymmetric: `(max - min) / 15` from min. With `clip` the range is shrunk to
    the share (of nine from 1 to 0.6) that gives the smallest squared error in the group.
    """
    g = w.astype(jnp.float32).reshape(*w.shape[:-1], -1, group)
    low, high = g.min(axis=-1), g.max(axis=-1)
    top = jnp.abs(g).max(axis=-1)

    def at(share: Array) -> tuple[Array, Array | None]:
        if qtype != "uint4":
            return jnp.maximum(top * share / _LARGEST[qtype], _TINY), None
        scale = jnp.maximum((high - low) * share / 15, _TINY)
        return scale, (high + low) / 2 - 7.5 * scale

    if not clip:
        return at(jnp.float32(1.0))

    def error(share: Array) -> Array:
        scale, offset = at(share)
        rounded = decode(encode(w, scale, offset, qtype), scale, offset, qtype)
        return jnp.square(rounded.reshape(g.shape) - g).sum(axis=-1)

    errors = jax.lax.map(error, jnp.asarray(_CLIPS, jnp.float32))
    return at(jnp.asarray(_CLIPS, jnp.float32)[errors.argmin(axis=0)])


def encode(w: Float[Array, "*O I"], scale: Array, offset: Array | None, qtype: str) -> Array:
    """Return the code nearest to each weight; ties go to the even one."""
    g = w.astype(jnp.float32).reshape(*scale.shape, -1)
    if offset is not None:
        g = g - offset[..., None]
    g = g / scale[..., None]
    if qtype == "nf4":
        edges = jnp.asarray((np.array(NF4[1:]) + np.array(NF4[:-1])) / 2, jnp.float32)
        code = jnp.searchsorted(edges, g).astype(jnp.int8)
    elif qtype.startswith("float8"):
        code = jnp.clip(g, -_LARGEST[qtype], _LARGEST[qtype]).astype(qtype)
    else:
        low = 0 if qtype == "uint4" else -_LARGEST[qtype]
        code = jnp.clip(jnp.round(g), low, 15 if qtype == "uint4" else _LARGEST[qtype]).astype(jnp.int8)
    return code.reshape(w.shape)


def decode(codes: Array, scale: Array, offset: Array | None, qtype: str) -> Float[Array, "*O I"]:
    """Return the weights that codes stand for, in float32."""
    values = jnp.asarray(np.array(NF4, np.float32))[codes] if qtype == "nf4" else codes.astype(jnp.float32)
    w = values.reshape(*scale.shape, -1) * scale[..., None]
    return (w if offset is None else w + offset[..., None]).reshape(codes.shape)


def leaf(
    codes: Array, scale: Array, offset: Array | None, qtype: str, shape: tuple[int, ...], inputs: int, dtype: DTypeLike
) -> Quantized:
    """Return codes `[..., I]` and their scales as the leaf of a weight of `shape`, whose last `inputs` axes are I."""
    tiles = shape[: len(shape) - inputs] + _tiles(shape[len(shape) - inputs :], scale.shape[-1])
    scale, offset = (None if part is None else part.astype(dtype).reshape(tiles) for part in (scale, offset))
    codes = codes.reshape(shape)
    if qtype in FOUR_BIT:
        return Packed(pack(codes), scale, offset, qtype=qtype, dtype=jnp.dtype(dtype))
    return QArray(codes, scale)


def round_to_nearest(
    w: Float[Array, "..."], inputs: int, qtype: str, group: int | None = None, clip: bool = False
) -> Quantized:
    """Return a weight, outputs first with its last `inputs` axes contracted, each entry rounded to its group's grid.

    `group` counts entries of the flattened inputs; None is all of them: one scale for each output.
    """
    flat = w.reshape(*w.shape[: w.ndim - inputs], -1)
    scale, offset = (
        # The codes must fit the scale as it is stored, which may be rounded.
        None if part is None else part.astype(w.dtype).astype(jnp.float32)
        for part in scales(flat, qtype, group or flat.shape[-1], clip)
    )
    return leaf(encode(flat, scale, offset, qtype), scale, offset, qtype, w.shape, inputs, w.dtype)


def fit_group(group: int, shape: tuple[int, ...], inputs: int, path: str) -> int:
    """Return the group size for a weight: `group`, or the largest one below it that tiles the weight's inputs.

    Raises:
        InputError: the size is below 2, or the inputs have no divisor of 8 or more that is not above it.
    """
    axes = shape[len(shape) - inputs :]
    total = math.prod(axes)
    fit = next((g for g in range(min(group, total), 1, -1) if total % g == 0 and _fits(axes, total // g)), 0)
    if fit < min(group, 8) or group < 2:
        sizes = [g for g in range(8, total + 1) if total % g == 0 and _fits(axes, total // g)]
        raise InputError(
            f"group={group}: nothing near it divides the {' x '.join(map(str, axes))} inputs of {path}; "
            f"sizes that do: {', '.join(map(str, sizes[:8])) or 'none'}"
        )
    return fit


def _fits(axes: tuple[int, ...], count: int) -> bool:
    try:
        _tiles(axes, count)
    except ValueError:
        return False
    return True


def _tiles(axes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return how many groups lie along each input axis when `count` equal runs cut the flattened axes."""
    group, tiles = math.prod(axes) // count, []
    for size in reversed(axes):
        inside = math.gcd(size, group)
        if inside != min(size, group):
            raise ValueError(f"{count} groups do not tile inputs of {axes}")
        tiles.append(size // inside)
        group //= inside
    return tuple(reversed(tiles))
