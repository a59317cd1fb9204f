"""Attention of few queries over a cache in machine code on a CPU, where XLA's products of such shapes are slow."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops import cpu_kernels
from jaxinfer.ops.cpu_kernels_vectors import LANES
from jaxinfer.ops.heads import group_heads, join_heads
from jaxinfer.ops.placement import free_axes

MOST_QUERIES = 16  # of a row: above, XLA's products have enough rows
_ITEMS = 8  # into which the work is cut at least, so that no thread waits long for another


def on_cpu(
    xla: Callable[..., Array],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Return attention by the kernel where the program runs on a CPU that has it and the shapes suit, else by `xla`.

    It is differentiated as `xla(q, k, v, positions)` is.
    """
    floats = all(x.dtype == jnp.float32 for x in (q, k, v))
    if not floats or q.shape[1] > MOST_QUERIES or q.shape[3] % LANES or 0 in (*q.shape, *k.shape):
        return xla(q, k, v, positions)
    if free_axes() or not cpu_kernels.available():  # machine code is called on one device
        return xla(q, k, v, positions)

    @jax.custom_jvp
    def kernel(q, k, v, positions):
        return _call(q, k, v, positions, scale, window)

    @kernel.defjvp
    def _(primals, tangents):
        return jax.jvp(functools.partial(xla, positions=primals[3]), primals[:3], tangents[:3])

    return jax.lax.platform_dependent(q, k, v, positions, cpu=kernel, default=xla)


def _call(q, k, v, positions, scale: float, window: int | None) -> Array:
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    G = N // K
    parts = -(-_ITEMS // (B * K)) if B * K < _ITEMS else 1
    stop = jnp.clip(positions + 1, 0, S)
    start = jnp.zeros_like(stop) if window is None else jnp.maximum(positions - window + 1, 0)
    bounds = jnp.broadcast_to(jnp.stack([start, stop], axis=-1)[:, None, None], (B, K, G, T, 2))
    bounds = bounds.astype(jnp.int32).reshape(B * K, G * T, 2)
    out = cpu_kernels.attention(group_heads(q, K, scale).reshape(B * K, G * T, H), bounds, k, v, parts)
    return join_heads(out.reshape(B, K, G, T, H))
