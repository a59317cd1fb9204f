"""Prompts' attention by cuDNN, for GPUs and shapes that the kernels are not for."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_FEW = 8  # query tokens up to which there is nothing to gain: the cache's bytes take the time


def on_cudnn(
    xla: Callable[..., Array],
    visible: Callable[..., Bool[Array, "B T S"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Return attention by cuDNN where JAX has a GPU with it that can do this, and else `xla(q, k, v, positions)`.

    `visible(positions, slots, window)` tells what a query sees. What a slot that no query sees holds is never used.
    """
    T, H, S = q.shape[1], q.shape[3], k.shape[2]
    half = q.dtype in (jnp.bfloat16, jnp.float16) and k.dtype == q.dtype
    if jax.default_backend() != "gpu" or T <= _FEW or not half or H > 128 or H % 8:
        return xla(q, k, v, positions)

    def cudnn(q: Array, k: Array, v: Array, positions: Array) -> Array:
        seen = visible(positions, jnp.arange(S)[None], window)
        used = seen.any(axis=1)[:, :, None, None]
        keys, values = (jnp.where(used, x.swapaxes(1, 2), 0) for x in (k, v))  # 0 * NaN is NaN
        seen = seen | ~seen.any(axis=2, keepdims=True)  # padding sees all, rather than nothing, which is NaN
        return jax.nn.dot_product_attention(
            q, keys, values, mask=seen[:, None], scale=scale, implementation="cudnn"
        )  # fmt: skip

    try:
        return jax.lax.platform_dependent(q, k, v, positions, cuda=cudnn, default=xla)
    except (NotImplementedError, RuntimeError, ValueError):  # no cuDNN, or one that says that it can't
        return xla(q, k, v, positions)
