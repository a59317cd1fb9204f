"""Rotation and append in plain jax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.calls import Known

LARGEST = {"int8": 127.0, "uint8": 448.0}  # the largest code; uint8: bits of float8_e4m3fn


def rope_append(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    k_cache: Array,
    v_cache: Array,
    k_scale: Float[Array, "rows K S"] | None = None,
    v_scale: Float[Array, "rows K S"] | None = None,
    *,
    ring: bool = False,
    table: Int[Known, "B M"] | None = None,
) -> tuple[Float[Array, "B T N H"], tuple[Array, ...]]:
    """Return what the contract of this folder says."""
    q, k = (_rotated(x, cos, sin) for x in (q, k))
    new, caches = (k, v), (k_cache, v_cache)
    if k_scale is not None:
        coded = [_coded(x, k_cache.dtype) for x in new]
        new, caches = (*(x for x, _ in coded), *(x for _, x in coded)), (*caches, k_scale, v_scale)
    return q, tuple(_written(cache, x, start, counts, ring, table) for cache, x in zip(caches, new, strict=True))


def _rotated(x: Array, cos: Array, sin: Array) -> Array:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _coded(x: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    largest, x = LARGEST[dtype.name], x.astype(jnp.float32)
    scale = (jnp.abs(x).max(axis=-1) / largest).astype(jnp.bfloat16)
    codes = jnp.clip(x / jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None], -largest, largest)
    if dtype == jnp.uint8:
        return jax.lax.bitcast_convert_type(codes.astype(jnp.float8_e4m3fn), jnp.uint8), scale
    return jnp.round(codes).astype(jnp.int8), scale


def _written(cache: Array, new: Array, start: Array, counts: Array, ring: bool, table: Array | None) -> Array:
    (B, T, K), S = new.shape[:3], cache.shape[2]
    tokens = jnp.arange(T)
    slots = jnp.asarray(start)[:, None] + tokens
    kept = tokens < jnp.asarray(counts)[:, None]
    rows, heads = jnp.arange(B)[:, None], jnp.arange(K)
    if table is not None:
        table = jnp.asarray(table)
        kept &= slots < S * table.shape[1]
        rows, slots = jnp.take_along_axis(table, jnp.where(kept, slots // S, 0), axis=1), slots % S
    slots = jnp.where(kept, slots % S if ring else slots, S)  # S: dropped
    return cache.at[rows[..., None], heads, slots[..., None]].set(new.astype(cache.dtype), mode="drop")
