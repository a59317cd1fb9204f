"""Paged decode attention in plain jax: the pages of every row are gathered, and `decode_attention` does the rest."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.calls import Known
from pallas_kernels.decode_attention.reference import decode_attention


def paged_decode_attention(
    q: Float[Array, "B T N H"],
    k_pages: Array,
    v_pages: Array,
    table: Int[Known, "B M"],
    length: Int[Known, "B"],
    *,
    scale: float,
    new: Mapping[str, Array] | None = None,
    start: Int[Known, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Known, "... T T"] | None = None,
    k_scale: Float[Array, "P K page"] | None = None,
    v_scale: Float[Array, "P K page"] | None = None,
    return_lse: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    T = q.shape[1]
    pages = {"k": k_pages, "v": v_pages, "k_scale": k_scale, "v_scale": v_scale}
    pages = {name: x for name, x in pages.items() if x is not None}
    table, length = jnp.asarray(table), jnp.asarray(length)
    if new is not None:
        pages = {name: append(x, new[name], table, length) for name, x in pages.items()}
    M, page = table.shape[1], k_pages.shape[2]
    live = jnp.arange(M) * page < length[:, None]
    gathered = {name: gather(x, jnp.where(live, table, 0)) for name, x in pages.items()}
    k, v = gathered.pop("k"), gathered.pop("v")
    found = decode_attention(
        q, k, v, length, scale=scale, start=start, window=window, sinks=sinks, softcap=softcap, tree=tree,
        position=None if tree is not None else length - T, return_lse=return_lse, **gathered,
    )  # fmt: skip
    if new is None:
        return found
    return (*(found if return_lse else (found,)), tuple(pages.values()))


def gather(pages: Array, table: Int[Array, "B M"]) -> Array:
    """Return the cache `[B, K, M * page, ...]` whose pages the table names."""
    found = pages[table].swapaxes(1, 2)  # [B, K, M, page, ...]
    return found.reshape(*found.shape[:2], -1, *found.shape[4:])


def append(pages: Array, new: Array, table: Int[Array, "B M"], length: Int[Array, "B"]) -> Array:
    """Return the pages with the new tokens `[B, T, K, ...]` from position `length - T`; negative ones are left out."""
    T, page = new.shape[1], pages.shape[2]
    at = (length - T)[:, None] + jnp.arange(T)
    number = jnp.take_along_axis(table, jnp.maximum(at, 0) // page, axis=1)
    number = jnp.where(at >= 0, number, pages.shape[0])  # past the end: dropped
    return pages.at[number, :, jnp.maximum(at, 0) % page].set(new.astype(pages.dtype), mode="drop")
