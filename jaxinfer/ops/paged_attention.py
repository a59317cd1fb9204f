"""Attention of a few new tokens over a cache in pages, which are appended to in the same call."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops.attention import group_heads, ungroup_heads, visible
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.online_attention import SLOT_BLOCK, block_range, finite, shares_of_blocks
from pallas_kernels import paged_decode_attention

Pages = tuple[Float[Array, "P K page H"], Float[Array, "P K page H"]]


def paged_attention(
    q: Float[Array, "B T N H"],
    new: tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]],
    pages: Pages,
    table: Int[Array, "B M"],
    length: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Pages]:
    """Return the attention of each row's T newest tokens, and the pages with their keys and values in.

    Slot s of row b is slot `s % page` of page `table[b, s // page]`. `length` counts the new tokens; a row of length 0
    writes nothing, and its output is 0. Entries of the table past a row's length name nothing. Pages that are donated
    are changed in place. (PagedAttention, 2309.06180.)

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)

    def pallas(q, new, pages, table, length):
        given = dict(zip("kv", (x.astype(p.dtype) for x, p in zip(new, pages, strict=True)), strict=True))
        return paged_decode_attention.tpu(q, *pages, table, length, new=given, **options)

    return choose(implementation, pallas, functools.partial(_by_blocks, **options), q, new, pages, table, length)


def _by_blocks(q, new, pages, table, length, *, scale, window, softcap):
    """Append, and then gather some pages of every row at a time, as far as the longest row goes."""
    T, (_, K, page, _), M = q.shape[1], pages[0].shape, table.shape[1]
    pages = tuple(_append(p, x, table, length) for p, x in zip(pages, new, strict=True))
    positions = (length - T)[:, None] + jnp.arange(T)
    table = jnp.where(jnp.arange(M) * page < length[:, None], table, 0)
    each = min(M, max(1, SLOT_BLOCK // page))

    def read(i):
        start = jnp.minimum(i * each, M - each)
        numbers = jax.lax.dynamic_slice_in_dim(table, start, each, axis=1)
        k, v = (p[numbers].swapaxes(1, 2).reshape(len(table), K, each * page, -1) for p in pages)
        slots = start * page + jnp.arange(each * page)[None]
        # The last block may reach back over slots that the one before it has counted.
        return k, v, visible(positions, slots, window) & (slots >= i * each * page)[:, None]

    first, last = block_range(positions, each * page, -(-M // each), window)
    shares = shares_of_blocks(group_heads(q, K, scale), read, first, last, softcap)
    out = ungroup_heads(finite(shares), q)
    return jnp.where((positions >= 0)[:, :, None, None], out, 0), pages


def _append(
    pages: Float[Array, "P K page H"], new: Float[Array, "B T K H"], table: Int[Array, "B M"], length: Int[Array, "B"]
) -> Float[Array, "P K page H"]:
    T, page = new.shape[1], pages.shape[2]
    at = (length - T)[:, None] + jnp.arange(T)
    number = jnp.take_along_axis(table, jnp.maximum(at, 0) // page, axis=1)
    number = jnp.where(at >= 0, number, pages.shape[0])  # past the end: dropped
    return pages.at[number, :, jnp.maximum(at, 0) % page].set(new.astype(pages.dtype), mode="drop")
