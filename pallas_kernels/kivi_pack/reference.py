"""Packing in plain jax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from pallas_kernels.calls import Known

TOP = 15.0  # the largest code
BF16 = jnp.finfo(jnp.bfloat16)


def kivi_pack(
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    k_codes: UInt8[Array, "B K bytes H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_codes: UInt8[Array, "B K bytes H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    *,
    group: int,
) -> tuple[tuple[Array, ...]]:
    """Return what the contract of this folder says."""
    old = (k_codes, k_scale, k_offset, v_codes, v_scale, v_offset)
    M, runs = k_scale.shape[2], v_scale.shape[1] // v.shape[1]
    index, complete = completed(start, counts, group, M)
    new = packed(*(tokens(ring, index, group) for ring in (k, v)), runs)
    return (tuple(_put(x, one, index, complete, M) for x, one in zip(old, new, strict=True)),)


def completed(
    start: Int[Known, "B"], counts: Int[Known, "B"], group: int, most: int
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Return the group that each row's new tokens begin in, and whether they complete it and there is room for it."""
    start, counts = jnp.asarray(start), jnp.asarray(counts)
    index = start // group
    return index, ((start + counts) // group > index) & (index < most)


def packed(k: Float[Array, "B K G H"], v: Float[Array, "B K G H"], runs: int) -> tuple[Array, ...]:
    """Return a group of each row in the order of the contract's arrays."""
    B, K, G, H = v.shape
    keys, k_scale, k_offset = _coded(k, 2)
    values, *grids = _coded(v.reshape(B, K, G, runs, H // runs), 4)
    v_scale, v_offset = (x[..., 0].swapaxes(2, 3).reshape(B, K * runs, G) for x in grids)
    return _bytes(keys), k_scale, k_offset, _bytes(values.reshape(v.shape)), v_scale, v_offset


def tokens(ring: Float[Array, "B K R H"], index: Int[Array, "B"], group: int) -> Float[Array, "B K G H"]:
    """Return the tokens of a group of each row."""
    slots = (index * group)[:, None] + jnp.arange(group)
    return jnp.take_along_axis(ring, (slots % ring.shape[2])[:, None, :, None], axis=2)


def _coded(x: Array, axis: int) -> tuple[Array, Array, Array]:
    x = x.astype(jnp.float32)
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    offset, scale = _rounded(low), _rounded(_divided(high - low, TOP))
    codes = jnp.round(_divided(x - offset, jnp.where(scale > 0, scale, 1)))
    return jnp.clip(codes, 0, TOP).astype(jnp.uint8), *(part.astype(jnp.bfloat16) for part in (scale, offset))


def _divided(a: Array, b: Array | float) -> Array:
    """Return a / b: of what is constant along an axis XLA would multiply by the reciprocal, rounded twice."""
    return a / jax.lax.optimization_barrier(jnp.broadcast_to(b, a.shape))


def _rounded(x: Array) -> Array:
    """Return numbers in float32 as bfloat16 has them: XLA leaves out a cast there and back."""
    return jax.lax.reduce_precision(x, exponent_bits=BF16.nexp, mantissa_bits=BF16.nmant)


def _bytes(codes: Array) -> Array:
    low, high = jnp.split(codes, 2, axis=2)
    return low | (high << 4)


def _put(old: Array, new: Array, index: Array, complete: Array, count: int) -> Array:
    """Return an array of `count` groups along its axis 2 with the `new` one of each row whose group is complete."""
    own = old.shape[2] // count
    slots = jnp.where(complete, index, count)[:, None] * own + jnp.arange(own)  # past the end: dropped
    rows, heads = jnp.arange(len(old))[:, None, None], jnp.arange(old.shape[1])[:, None]
    return old.at[rows, heads, slots[:, None]].set(new.reshape(*old.shape[:2], own, *old.shape[3:]), mode="drop")
