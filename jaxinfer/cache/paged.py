"""Keys and values in pages of some tokens, found through a table: rows that begin alike can share their pages."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.page_table import copy_pages, fork_pages, join_table, own_table
from jaxinfer.cache.quantized import quantize
from jaxinfer.errors import InputError
from jaxinfer.ops.paged_attention import New, Pages, paged_attention, read_pages, write_pages
from jaxinfer.ops.placement import Names
from jaxinfer.ops.token_tree import TokenTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paged:
    """The kind of cache that keeps everything in pages of `page` tokens, as numbers or as int8 codes with scales."""

    page: int = 64
    int8: bool = False

    def __post_init__(self):
        if self.page < 1:
            raise InputError(f"page={self.page}: must be at least 1 token; 64 suits the kernel for TPU")

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "PagedLayer":
        """Return an empty cache: as many pages as `batch` rows of `slots` tokens fill, and page 0."""
        shape = (1 + batch * -(-slots // self.page), kv_heads, self.page)
        # Two arrays, not one twice: a donated buffer belongs to one of them.
        k, v = (jnp.zeros((*shape, head_dim), jnp.int8 if self.int8 else dtype) for _ in range(2))
        k_scale, v_scale = (jnp.zeros(shape, jnp.bfloat16) if self.int8 else None for _ in range(2))
        return PagedLayer(pages=Pages(k, v, k_scale, v_scale), table=own_table(shape[0], batch), new=None)


@nnx.dataclass
class PagedLayer(nnx.Module):
    """A pool of pages and each row's table of them. Only the last, partly filled pages of rows are ever written."""

    pages: Pages = nnx.data()
    table: Int[Array, "B M"] = nnx.data()
    new: New | None = nnx.data()  # between append and attend: one call does both
    axes: ClassVar[dict[str, Names]] = {
        "pages": ("batch", "kv_heads"), "table": ("batch",), "new": ("batch", None, "kv_heads"),
    }  # fmt: skip

    @property
    def slots(self) -> int:
        """How many tokens a row may have."""
        return self.table.shape[1] * self.pages.k.shape[2]

    @property
    def exact_rewind(self) -> None:
        """Any number of tokens: each has its own slot."""
        return None

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "PagedLayer":
        """Hold each row's first counts[b] new tokens until they are attended from, and are written in the same call."""
        k_scale = v_scale = None
        if self.pages.k_scale is not None:
            (k, k_scale), (v, v_scale) = (quantize(x, "int8") for x in (k, v))
        else:
            k, v = k.astype(self.pages.k.dtype), v.astype(self.pages.v.dtype)
        return PagedLayer(pages=self._written(), table=self.table, new=New(k, v, k_scale, v_scale, start, counts))

    def append_by(
        self, put: Callable[..., Any], tokens: int, start: Int[Array, "B"], counts: Int[Array, "B"]
    ) -> tuple[Any, "PagedLayer"]:
        """Do what `append` does, where `put` writes the tokens to the pages at once: see `rotated`."""
        del tokens
        found, pages = put(self._written(), start, counts, table=self.table)
        return found, self._attended_next(pages, start, counts)

    def written(self) -> "PagedLayer":
        """Return the cache with what `append` holds in the pages, as `append_by` leaves it."""
        return self._attended_next(self._written(), self.new.start, self.new.counts)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "PagedLayer"]:
        """Write the new tokens and attend over the live pages."""
        options = dict(scale=scale, window=window, softcap=softcap, tree=tree)
        out, pages = paged_attention(q, self.new, self.pages, self.table, positions, **options)
        return out, PagedLayer(pages=pages, table=self.table, new=None)

    def rewind(self, length: Int[Array, "B"]) -> "PagedLayer":
        """Only write what is new: a slot past the length is masked by its position and overwritten by the next append.

        A row that shares pages must not be appended to below the length that it was forked at.
        """
        return PagedLayer(pages=self._written(), table=self.table, new=None)

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "PagedLayer":
        """Move the path's tokens to the slots of their positions."""
        pages = self._written()
        path = New(*read_pages(pages, self.table, start[:, None] + nodes), start, counts)
        return PagedLayer(pages=write_pages(pages, path, self.table), table=self.table, new=None)

    def take(self, rows: Int[Array, "n"]) -> "PagedLayer":
        """Return copies of rows, each in pages of its own."""
        pages = copy_pages(self._written(), self.table[rows])
        return PagedLayer(pages=pages, table=own_table(len(pages.k), len(rows)), new=None)

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "PagedLayer":
        """Return rows that share the pages that are full; of the last one, partly filled, each has a copy."""
        pages, table = fork_pages(self._written(), self.table[rows], self.pages.k.shape[2], length, room)
        return PagedLayer(pages=pages, table=table, new=None)

    def joined(self, pools: int) -> "PagedLayer":
        """Return the rows of so many pools, end to end, each with as many rows, as rows of one pool."""
        table = join_table(self.table, len(self.pages.k), pools)
        return PagedLayer(pages=self.pages, table=table, new=self.new)

    def _attended_next(self, pages: Pages, start: Array, counts: Array) -> "PagedLayer":
        return PagedLayer(pages=pages, table=self.table, new=New(None, None, None, None, start, counts))

    def _written(self) -> Pages:
        """Return the pages with what was appended last in them."""
        return self.pages if self.new is None else write_pages(self.pages, self.new, self.table)
