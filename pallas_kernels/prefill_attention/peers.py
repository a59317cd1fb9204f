"""Others' kernels of causal prefill attention, with our arguments: jax's flash, its and tokamax's splash, and XLA's.

libtpu's simulator does not know the block lists that splash attention prefetches: it aborts on them on v5e, and skips
blocks on v6e. So they are written into the kernel as constants (`peers.known_blocks`), which costs it a few scalar
instructions a block. XLA's is not a kernel: the scores of all heads go through HBM.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chips, peers, tokamax_splash


def _flash(block):
    def run(q, k, v, *, scale):
        from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, flash_attention

        k, v = (jnp.repeat(x, q.shape[2] // k.shape[1], axis=1) for x in (k, v))
        sizes = None if block is None else BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
        out = flash_attention(q.transpose(0, 2, 1, 3), k, v, causal=True, sm_scale=scale, block_sizes=sizes)
        return out.transpose(0, 2, 1, 3)

    return run


def _splash(block):
    def run(q, k, v, *, scale, window=None, position=None):
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

        shape, first = (q.shape[1], k.shape[2]), 0 if position is None else int(position[0])
        mask = splash_attention_mask.CausalMask(shape, offset=first)
        if window is not None:
            mask = splash_attention_mask.LocalMask(shape, window_size=(window - 1, 0), offset=first)
        heads = splash_attention_mask.MultiHeadMask([mask] * q.shape[2])
        sizes = splash_attention_kernel.BlockSizes(block_q=block, block_kv=block, block_kv_compute=512)
        with jax.ensure_compile_time_eval():
            made = splash_attention_kernel.make_splash_mha(heads, block_sizes=sizes, head_shards=1, q_seq_shards=1)
        # Its own call makes tracers of the lists; this is what that call does.
        attend = splash_attention_kernel._splash_attention_forward
        options = dict(made.kwargs) | {"segment_ids": None, "sinks": None}
        names = ("segment_ids", "sinks", "mask_value", "is_mqa", "block_sizes", "residual_checkpoint_name",
                 "save_residuals", "mask_function", "attn_logits_soft_cap", "interpret")  # fmt: skip
        options = {name: x for name, x in options.items() if name in names}
        with peers.known_blocks(chips.current().vmem_limit):
            queries = (q[0] * scale).swapaxes(0, 1)
            out = attend(made.fwd_mask_info, queries, k[0], v[0], **options)
        return out.swapaxes(0, 1)[None]

    return run


def _tokamax(block):
    def run(q, k, v, *, scale):
        config = {"block_q": block, "block_kv": block, "block_kv_compute": 512}
        out = tokamax_splash.attend((q[0] * scale).swapaxes(0, 1), k[0], v[0], causal=True, config=config)
        return out.swapaxes(0, 1)[None]

    return run


def _xla(q, k, v, *, scale):
    T, S = q.shape[1], k.shape[2]
    seen = jnp.tri(T, S, S - T, dtype=bool)
    return jax.nn.dot_product_attention(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), scale=scale, mask=seen)


PEERS = {"flash": _flash(None), "xla": _xla}
PEERS |= {f"flash_{n}": _flash(n) for n in (256, 512, 1024)}
PEERS |= {f"splash_{n}": _splash(n) for n in (512, 1024)}
PEERS |= {f"tokamax_{n}": _tokamax(n) for n in (512, 1024)}
