"""Attention over a cache in pages: rows that begin alike may share pages, and new tokens are appended in the same call.

Slot s of row b is slot `s % page` of page `table[b, s // page]`. (PagedAttention, 2309.06180.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Shaped

from jaxinfer.ops.attention import (
    Scaled,
    by_query_blocks,
    check_tree,
    group_heads,
    ungroup_heads,
    visible,
)
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_attention import DECODE_TOKENS, TREE_NODES, kernel_attention
from jaxinfer.ops.online_attention import SLOT_BLOCK, block_range, finite, shares_of_blocks
from jaxinfer.ops.scatter import put
from jaxinfer.ops.token_tree import TokenTree
from pallas_kernels import paged_decode_attention, targets


class Pages(NamedTuple):
    """A pool of pages, of which page 0 is no row's: entries of a table that name nothing name it.

    Of int8 codes there are scales, one a token and head.
    """

    k: Float[Array, "P K page H"] | Int8[Array, "P K page H"]
    v: Float[Array, "P K page H"] | Int8[Array, "P K page H"]
    k_scale: Float[Array, "P K page"] | None = None
    v_scale: Float[Array, "P K page"] | None = None

    @property
    def stores(self) -> tuple[str, ...]:
        """The names of the arrays that there are: see `cache.rotated`."""
        return tuple(name for name, x in self._asdict().items() if x is not None)


class New(NamedTuple):
    """Tokens to append: the first counts[b] of row b's T, at slots from start[b]; their arrays are `[B, T, K, ...]`.

    Or tokens that are in the pages already, whose queries come next: then there are no arrays.
    """

    k: Float[Array, "B T K H"] | Int8[Array, "B T K H"] | None
    v: Float[Array, "B T K H"] | Int8[Array, "B T K H"] | None
    k_scale: Float[Array, "B T K"] | None
    v_scale: Float[Array, "B T K"] | None
    start: Int[Array, "B"]
    counts: Int[Array, "B"]


def paged_attention(
    q: Float[Array, "B T N H"],
    new: New | None,
    pages: Pages,
    table: Int[Array, "B M"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tree: TokenTree | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], Pages]:
    """Return what `ops.attention.attention` returns for the slots of the table's pages, and the pages with `new` in.

    Where q and `new` have equally many tokens, they are the same ones. Tokens past the table's last slot are not kept;
    of padding nothing is read, and its output is 0 or means nothing. Pages that are donated are changed in place.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)
    pallas, xla = functools.partial(_by_kernels, **options), functools.partial(_by_blocks, **options)
    return choose(implementation, pallas, xla, q, new, pages, table, positions, tree)


def _by_kernels(q, new, pages, table, positions, tree, *, scale, window, softcap):
    """Append and attend in one kernel where the tokens are few; else append, and attend over a copy of the rows."""
    options = dict(scale=scale, window=window, softcap=softcap)
    T, page = q.shape[1], pages.k.shape[2]
    most = DECODE_TOKENS if tree is None else TREE_NODES
    if most < T or new is None or (new.k is not None and new.k.shape[1] != T):
        pages = pages if new is None else write_pages(pages, new, table)
        k, v, k_scale, v_scale = (None if x is None else gather_pages(x, table) for x in pages)
        return kernel_attention(q, k, v, positions, k_scale=k_scale, v_scale=v_scale, tree=tree, **options), pages
    length = jnp.where(new.counts > 0, new.start + T, 0)
    given = {name: x for name, x in zip(Pages._fields, new, strict=False) if x is not None}
    if given:
        # The kernel appends all T tokens of a row that has any. What is padding lies past the row's length, where the
        # next tokens overwrite it, in pages of the row's own, or past the table: there in page 0.
        table = jnp.pad(table, ((0, 0), (0, -(-T // page))))
    found = targets.kernel(paged_decode_attention)(
        q, pages.k, pages.v, table, length, new=given or None, k_scale=pages.k_scale, v_scale=pages.v_scale,
        tree=None if tree is None else jnp.asarray(tree.ancestors), **options,
    )  # fmt: skip
    return (found[0], Pages(*found[1])) if given else (found, pages)


def _by_blocks(q, new, pages, table, positions, tree, *, scale, window, softcap):
    """Append, and then gather some pages of every row at a time, as far as the longest row goes."""
    check_tree(q, tree)
    pages = pages if new is None else write_pages(pages, new, table)
    (_, K, page, _), M = pages.k.shape, table.shape[1]
    each = min(M, max(1, SLOT_BLOCK // page))

    def attend(q: Array, positions: Array, _) -> Array:
        def read(i: Array):
            start = jnp.minimum(i * each, M - each)
            numbers = jax.lax.dynamic_slice_in_dim(table, start, each, axis=1)
            k, v, k_scale, v_scale = (None if x is None else gather_pages(x, numbers) for x in pages)
            slots = start * page + jnp.arange(each * page)[None]
            # The last block may reach back over slots that the one before it has counted.
            seen = visible(positions, slots, window, tree) & (slots >= i * each * page)[:, None]
            return (k, v, seen) if k_scale is None else (Scaled(k, k_scale), Scaled(v, v_scale), seen)

        first, last = block_range(positions, each * page, -(-M // each), window, tree)
        shares = shares_of_blocks(group_heads(q, K, scale), read, first, last, softcap)
        return jnp.where((positions >= 0)[:, :, None, None], ungroup_heads(finite(shares), q), 0)

    return by_query_blocks(attend, q, positions), pages


def write_pages(pages: Pages, new: New, table: Int[Array, "B M"]) -> Pages:
    """Return the pages with each row's new tokens at their slots; what would pass the table's last slot is dropped."""
    if new.k is None:
        return pages
    T, page, M = new.k.shape[1], pages.k.shape[2], table.shape[1]
    slots = new.start[:, None] + jnp.arange(T)
    kept = (jnp.arange(T) < new.counts[:, None]) & (slots >= 0) & (slots < M * page)
    slots = jnp.where(kept, slots, 0)
    number = jnp.take_along_axis(table, slots // page, axis=1)
    number = jnp.where(kept, number, pages.k.shape[0])  # past the last page: dropped

    def write(store, x):
        return None if store is None else put(store, (number, slice(None), slots % page), x)

    return Pages(*(write(store, x) for store, x in zip(pages, new, strict=False)))


def gather_pages(store: Shaped[Array, "P K page *rest"], table: Int[Array, "B M"]) -> Shaped[Array, "B K S *rest"]:
    """Return the slots of each row, side by side."""
    found = store[table].swapaxes(1, 2)  # [B, K, M, page, ...]
    return found.reshape(*found.shape[:2], -1, *found.shape[4:])


def read_pages(pages: Pages, table: Int[Array, "B M"], slots: Int[Array, "B T"]) -> Pages:
    """Return what is in some slots of each row, `[B, T, K, ...]` as new tokens have it."""
    page = pages.k.shape[2]
    slots = jnp.clip(slots, 0, table.shape[1] * page - 1)
    number = jnp.take_along_axis(table, slots // page, axis=1)
    return Pages(*(None if x is None else x[number, :, slots % page] for x in pages))
