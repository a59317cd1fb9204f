"""Others' kernels of causal prefill attention, with our arguments: jax's flash attention, and what XLA makes of it.

Splash attention is not among them: libtpu's simulator refuses it on v5e, and follows too few of its blocks on v6e.
"""

import jax
import jax.numpy as jnp


def _flash(block):
    def run(q, k, v, *, scale):
        from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

        k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
        sizes = None if block is None else BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
        out = flash_attention(q.transpose(0, 2, 1, 3), k, v, causal=True, sm_scale=scale, block_sizes=sizes)
        return out.transpose(0, 2, 1, 3)

    return run


def _xla(q, k, v, *, scale):
    T, S = q.shape[1], k.shape[2]
    seen = jnp.tri(T, S, S - T, dtype=bool)
    return jax.nn.dot_product_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), scale=scale, mask=seen)


PEERS = {"flash": _flash(None), "xla": _xla}
PEERS |= {f"flash_{n}": _flash(n) for n in (256, 512, 1024)}
