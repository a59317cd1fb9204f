"""The pages of rows: slot s of row b is in page `table[b, s // page]` of a pool, of which page 0 is no row's.

A pool is a tree of arrays `[P, ...]`; entries of a table that name nothing name page 0. (PagedAttention, 2309.06180.)
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

Pool = TypeVar("Pool")


def own_table(pages: int, rows: int) -> Int[Array, "B M"]:
    """Return a table in which each row has its share of the `pages` pages from page 1, in order."""
    return jnp.arange(1, pages, dtype=jnp.int32).reshape(rows, -1)


def join_table(table: Int[Array, "B M"], pages: int, pools: int) -> Int[Array, "B M"]:
    """Return the table of rows in so many pools of their own, end to end, as one of a pool of all the `pages` pages."""
    own = jnp.arange(len(table)) // (len(table) // pools)
    return table + pages // pools * own[:, None]


def copy_pages(pool: Pool, table: Int[Array, "B M"]) -> Pool:
    """Return a pool of copies of a table's pages, row by row: `own_table` tells where they are."""

    def copies(store: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(store[:1]), store[table.reshape(-1)]])

    return jax.tree.map(copies, pool)


def fork_pages(
    pool: Pool, table: Int[Array, "B M"], page: int, length: Int[Array, "B"], room: int
) -> tuple[Pool, Int[Array, "B M"]]:
    """Return a pool and a table in which rows share the pages that are full at length[b], and copy the one that isn't.

    Beside the pages that there are, each row gets those that `room` tokens more can need.
    """
    P, (n, M) = len(jax.tree.leaves(pool)[0]), table.shape
    own = min(M, -(-room // page) + 1)
    full = (length // page)[:, None]
    column = jnp.arange(M) - full
    first = P + own * jnp.arange(n)[:, None]  # number of each row's first own page
    last = jnp.take_along_axis(table, jnp.minimum(full, M - 1), axis=1)[:, 0]

    def longer(store: Array) -> Array:
        fresh = jnp.zeros((n, own, *store.shape[1:]), store.dtype).at[:, 0].set(store[last])
        return jnp.concatenate([store, fresh.reshape(-1, *store.shape[1:])])

    table = jnp.where(column < 0, table, jnp.where(column < own, first + column, 0))
    return jax.tree.map(longer, pool), table
