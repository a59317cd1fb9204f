"""What paged decode attention is timed beside."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import peers


def jax_paged_attention(
    q, k_pages, v_pages, table, length, *, scale, new=None, k_scale=None, v_scale=None, blocks=None, slots
):
    """Return JAX's `paged_attention` over the same pages, `slots` of them a block; it appends nothing."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention_kernel

    del new, blocks
    if k_scale is not None:
        raise NotImplementedError("its quantized pages lie differently")
    P, K, page, H = k_pages.shape
    k, v = (x.reshape(K, P, page, H) for x in (k_pages, v_pages))  # what the pages hold does not change the time
    values = [length, table, np.zeros(1), np.ones(1)]
    attend = functools.partial(
        paged_attention_kernel.paged_attention.__wrapped__, pages_per_compute_block=slots // page
    )
    with peers.known_scalars(values):
        return attend(q[:, 0] * scale, k, v, jnp.asarray(length), jnp.asarray(table))


PEERS = {
    f"jax paged_attention, {slots} slots": functools.partial(jax_paged_attention, slots=slots) for slots in (512, 2048)
}
