"""Others' kernels of causal prefill attention on a GPU, with our arguments: cuDNN's, and jax's for Mosaic.

Both keep keys and values as `[B, S, K, H]`, and jax's has float16 alone and no scale: `prepare` gives them what they
take, and is no part of what is timed.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.case import Peer


def _swapped(q, k, v):
    return q, k.swapaxes(1, 2), v.swapaxes(1, 2)


def _refuse(q, k, rest):
    if rest or q.shape[1] != k.shape[2]:
        raise NotImplementedError(f"{', '.join(rest) or 'T != S'}: for another kernel")


def cudnn(window: int | None = None) -> Peer:
    """Return cuDNN's attention, causal, with a window or without."""

    def prepare(q, k, v, *, scale, **rest):
        if rest.pop("window", None) != window or scale != q.shape[3] ** -0.5:
            raise NotImplementedError(f"window={window} and the usual scale alone")
        _refuse(q, k, rest)
        return _swapped(q, k, v)

    def run(q, k, v):
        near = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=near, implementation="cudnn")

    return Peer(prepare, run)


def mosaic(block_kv: int) -> Peer:
    """Return jax's own Mosaic GPU attention, causal."""

    def prepare(q, k, v, *, scale, **rest):
        _refuse(q, k, rest)
        return tuple(x.astype(jnp.float16) for x in _swapped((q * scale).astype(q.dtype), k, v))

    def run(q, k, v):
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        config = attention_mgpu.TuningConfig(block_q=64, block_kv=block_kv, max_concurrent_steps=2, causal=True)
        return attention_mgpu.attention(q, k, v, config)

    return Peer(prepare, run)


GPU_PEERS = {"cudnn": cudnn(), "cudnn_window_1024": cudnn(1024), "mosaic_128": mosaic(128)}
