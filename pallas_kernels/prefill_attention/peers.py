"""Others' kernels of prefill attention, with our arguments: jax's flash and splash attention, and XLA's own."""

import jax
import jax.numpy as jnp


def _flash(block):
    def run(q, k, v, *, scale, **_):
        from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

        k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
        sizes = None if block is None else BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
        out = flash_attention(q.transpose(0, 2, 1, 3), k, v, causal=True, sm_scale=scale, block_sizes=sizes)
        return out.transpose(0, 2, 1, 3)

    return run


def _splash(block_q, block_kv, compute):
    def run(q, k, v, *, scale, window=None, **_):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        B, T, N, H = q.shape
        K, S = k.shape[1:3]
        one = masks.CausalMask((T, S), offset=S - T)
        if window is not None:
            one = masks.LocalMask((T, S), (window - 1, 0), offset=S - T)
        sizes = splash.BlockSizes(block_q=block_q, block_kv=block_kv, block_kv_compute=compute)
        attend = splash.make_splash_mqa_single_device(masks.MultiHeadMask([one] * (N // K)), block_sizes=sizes)
        heads = (q * scale).transpose(0, 2, 1, 3).reshape(B, K, N // K, T, H)
        return jax.vmap(jax.vmap(attend))(heads, k, v).reshape(B, N, T, H).transpose(0, 2, 1, 3)

    return run


def _xla(q, k, v, *, scale, **_):
    T, S = q.shape[1], k.shape[2]
    seen = jnp.tri(T, S, S - T, dtype=bool)
    return jax.nn.dot_product_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), scale=scale, mask=seen)


PEERS = {"flash": _flash(None), "xla": _xla}
PEERS |= {f"flash_{n}": _flash(n) for n in (256, 512, 1024)}
PEERS |= {
    f"splash_{q}_{s}_{c}": _splash(q, s, c)
    for q, s, c in [(512, 512, 512), (1024, 1024, 512), (1024, 2048, 1024), (2048, 2048, 512)]
}
