"""Keys and values of 2 or 4 bits, in groups of consecutive tokens: a grid for each channel of a group's keys.

Keys have channels that are large in every token, values do not (KIVI, 2402.02750).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, UInt8

GRID_DTYPE = jnp.bfloat16


class Grid(NamedTuple):
    """Numbers `code * scale + offset`, with n codes in each byte.

    Byte j of the last axis holds the codes of channels j, j + H / n, j + 2 H / n ..., the first in its lowest bits.
    """

    codes: UInt8[Array, "*lead h"]
    scale: Float[Array, "*grids"]
    offset: Float[Array, "*grids"]


@nnx.dataclass
class Groups(nnx.Module):
    """M groups of G tokens: keys with a scale a group and channel, values with one a token and run of channels."""

    k: Grid = nnx.data()  # codes [B, K, M, G, h], scale [B, K, M, 1, H]
    v: Grid = nnx.data()  # codes [B, K, M, G, h], scale [B, K, M, G, runs]


def quantize_groups(k: Float[Array, "B K M G H"], v: Float[Array, "B K M G H"], bits: int) -> Groups:
    """Return the groups in `bits` bits a number; a run of value channels is G long, or all H where G does not divide H.

    Every number is within half a scale of what it was, up to float rounding.
    """
    G, H = k.shape[-2:]
    run = G if H % G == 0 else H
    keys, key_scale, key_offset = _fit(k, 3, bits)
    values, value_scale, value_offset = _fit(v.reshape(*v.shape[:-1], H // run, run), 5, bits)
    return Groups(
        k=Grid(_pack(keys, bits), key_scale, key_offset),
        v=Grid(_pack(values.reshape(v.shape), bits), value_scale[..., 0], value_offset[..., 0]),
    )


def dequantize_groups(groups: Groups, dtype: DTypeLike) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Return the keys and values of the groups' tokens, which are S = M * G."""
    B, K, M, G, h = groups.k.codes.shape
    H, runs = groups.k.scale.shape[-1], groups.v.scale.shape[-1]
    k = _unpack(groups.k.codes, 8 * h // H) * groups.k.scale + groups.k.offset
    v = _unpack(groups.v.codes, 8 * h // H).reshape(B, K, M, G, runs, H // runs)
    v = v * groups.v.scale[..., None] + groups.v.offset[..., None]
    return k.reshape(B, K, M * G, H).astype(dtype), v.reshape(B, K, M * G, H).astype(dtype)


def _fit(x: Array, axis: int, bits: int) -> tuple[Array, Array, Array]:
    """Return codes, and the scales and offsets of the grids that span the smallest and largest number along `axis`."""
    x, top = x.astype(jnp.float32), 2**bits - 1
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    offset = low.astype(GRID_DTYPE)
    start = offset.astype(jnp.float32)
    # Where rounding put the offset above the smallest number, that one must still be half a scale away at most.
    scale = jnp.maximum((high - start) / top, 2 * (start - low)).astype(GRID_DTYPE)
    codes = (x - start) / jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    return jnp.clip(jnp.round(codes), 0, top).astype(jnp.uint8), scale, offset


def _pack(codes: Array, bits: int) -> Array:
    parts = jnp.split(codes, 8 // bits, axis=-1)
    return sum(part << (bits * i) for i, part in enumerate(parts)).astype(jnp.uint8)


def _unpack(packed: Array, bits: int) -> Array:
    """Return the codes as float32. A broadcast and a reshape, no concatenation: it fuses into what reads it."""
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None]
    codes = (packed[..., None, :] >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(jnp.float32)
