"""What paged decode attention is timed beside."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, peers
from pallas_kernels.decode_attention.peers import xla as plain
from pallas_kernels.paged_decode_attention.reference import gather


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
    values = [length, table.ravel(), np.zeros(1), np.ones(1)]
    attend = functools.partial(
        paged_attention_kernel.paged_attention.__wrapped__, pages_per_compute_block=slots // page
    )
    with peers.known_scalars(values):
        return attend(q[:, 0] * scale, k, v, jnp.asarray(length), jnp.asarray(table))


def jax_ragged_paged_attention(
    q, k_pages, v_pages, table, length, *, scale, new=None, k_scale=None, v_scale=None, blocks=None, slots
):
    """Return JAX's `ragged_paged_attention` over as many bytes of pages, `slots` tokens a block; it appends nothing.

    Its pages hold keys and values side by side: half of one array's pages stand for them.
    """
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention

    del v_pages, new, blocks
    if k_scale is not None:
        raise NotImplementedError("it has one scale for all keys")
    (P, K, page, H), B = k_pages.shape, len(length)
    if len(q) * q.shape[1] != B:
        raise NotImplementedError("one token a row")
    pages = k_pages.reshape(P // 2, page, 2 * K, H)  # what the pages hold does not change the time
    table, ends, count = table % (P // 2), np.arange(B + 1), np.full(1, B)
    arrays = (jnp.asarray(x, jnp.int32) for x in (length, table, ends, count))
    blocks = {"num_kv_pages_per_block": slots // page, "num_queries_per_block": B}
    limit = chips.current().vmem_limit
    attend = ragged_paged_attention.ragged_paged_attention.__wrapped__
    with peers.known_scalars([length, table, ends, np.zeros(2), count]):
        return attend(q[:, 0], pages, *arrays, sm_scale=scale, vmem_limit_bytes=limit, **blocks)


def xla(q, k_pages, v_pages, table, length, *, scale, new=None, k_scale=None, v_scale=None, **options):
    """Return the formula in plain jax, over pages that are gathered first; it appends nothing."""
    del new
    scales = {} if k_scale is None else {"k_scale": gather(k_scale, table), "v_scale": gather(v_scale, table)}
    return plain(q, gather(k_pages, table), gather(v_pages, table), length, scale=scale, **scales, **options)


_JAX = {"paged_attention": jax_paged_attention, "ragged_paged_attention": jax_ragged_paged_attention}
PEERS = {
    f"jax {name}, {slots} slots": functools.partial(attend, slots=slots)
    for name, attend in _JAX.items()
    for slots in (512, 2048)
}
