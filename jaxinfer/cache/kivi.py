"""Old tokens in 4 bits or fewer, the newest ones as they are (KIVI, 2402.02750).

For a query at position p the tokens before `group * max(0, floor((p + 1 - residual) / group))` are quantized ones. That
depends on p alone: a prompt fed at once gives what the same prompt fed token by token gives.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.dense import Dense, DenseLayer
from jaxinfer.cache.groups import Groups, empty_groups
from jaxinfer.cache.packed_attention import packed_attention
from jaxinfer.cache.packed_pages import PackedPages, empty_pages
from jaxinfer.cache.packing import pack_completed
from jaxinfer.cache.recent_attention import recent_attention
from jaxinfer.cache.ring import SLACK, Ring, append_to_ring, check_tree
from jaxinfer.errors import InputError
from jaxinfer.ops.token_tree import TokenTree

TILE = 16  # groups whose scales fill a tile of a TPU's memory: the kernel reads whole ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi:
    """The kind of cache that packs tokens in groups of `group` once `residual` newer ones have come after them.

    With a `page`, packed groups are in pages of as many tokens, which rows forked from one share.
    """

    bits: int = 4
    group: int = 32
    residual: int = 64
    page: int | None = None

    def __post_init__(self):
        if self.bits not in (2, 4):
            raise InputError(f"bits={self.bits}: must be 2 or 4; for 8 there is QuantizedCache")
        if self.group < 1 or self.residual < 0:
            raise InputError(f"group={self.group}, residual={self.residual}: must be at least 1 and 0 tokens")
        if self.group * self.bits % 8:
            raise InputError(f"group={self.group} of {self.bits} bits: must be a multiple of {8 // self.bits} tokens")
        if self.page is not None and (self.page < 1 or self.page % self.group):
            raise InputError(f"page={self.page}: must be a multiple of group={self.group} tokens")

    def create(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "KiviLayer | DenseLayer":
        """Return an empty cache; the newest tokens are kept in `dtype`, which are all where the slots are few."""
        count = max(0, slots - self.residual) // self.group  # groups that some query reads
        if not count:
            return Dense().create(batch, slots, kv_heads, head_dim, dtype)
        if self.page is None and count > TILE and self.group % 64 == 0:
            count = TILE * -(-count // TILE)
        recent = self.group * -(-(self.residual + self.group + SLACK) // self.group)
        empty = empty_groups if self.page is None else functools.partial(empty_pages, self.page)
        return KiviLayer(
            groups=empty(batch, kv_heads, count, self.group, head_dim, self.bits, dtype),
            recent=Ring.empty(batch, kv_heads, recent, head_dim, dtype),
            kind=self,
            slots=slots,
        )


@nnx.dataclass
class KiviLayer(nnx.Module):
    """Packed groups of old tokens, and the recent ones in a ring."""

    groups: Groups | PackedPages = nnx.data()
    recent: Ring = nnx.data()
    kind: Kivi = nnx.static(kw_only=True)
    slots: int = nnx.static(kw_only=True)

    @property
    def exact_rewind(self) -> int | None:
        """As many tokens as the ring holds beyond those that a query reads in full precision."""
        return None if self.slots <= self.recent.size else self.recent.size - self._reach

    @property
    def _reach(self) -> int:
        return self.kind.residual + self.kind.group

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "KiviLayer":
        """Keep each row's first counts[b] new tokens as they are, and pack the groups that they complete."""
        return self.append_by(append_to_ring(k, v), k.shape[1], start, counts)[1]

    def append_by(
        self, put: Callable[..., Any], tokens: int, start: Int[Array, "B"], counts: Int[Array, "B"]
    ) -> tuple[Any, "KiviLayer"]:
        """Do what `append` does, where `put` writes the tokens to the ring: see `rotated`."""
        counts = jnp.clip(self.slots - start, 0, counts)
        found, recent = put(self.recent, start, counts)
        return found, self._with(pack_completed(self.groups, recent, start, counts, tokens), recent)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "KiviLayer"]:
        """Attend over the packed groups, and over the recent tokens."""
        residual = self.kind.residual
        fix = ", or keep more tokens as they are"
        check_tree(tree, q.shape[1], min(residual, SLACK), f" of residual={residual}", fix)
        options = dict(residual=residual, scale=scale, window=window, softcap=softcap)
        # None of a tree's nodes is packed yet.
        old = packed_attention(q, self.groups, positions, consecutive=tree is None, **options)
        out = recent_attention(q, self.recent, positions, old, group=self.kind.group, tree=tree, **options)
        return out, self._settled()

    def rewind(self, length: Int[Array, "B"]) -> "KiviLayer":
        """Nothing to do but to let go of the chunk: what lies past the length is masked, and written again."""
        return self._settled()

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "KiviLayer":
        """Append the path anew, in place of the tree: groups that it completes are packed, and not what a tree left."""
        base = self._settled()
        return base.append(*base.recent.at(start[:, None] + nodes), start, counts)._settled()

    def take(self, rows: Int[Array, "n"]) -> "KiviLayer":
        """Copy the rows."""
        return self._with(self.groups.take(rows), self.recent.take(rows))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "KiviLayer":
        """Copy the recent tokens; of the packed ones pages are shared that are full, and rows copied."""
        return self._with(self.groups.fork(rows, length, room), self.recent.take(rows))

    def _settled(self) -> "KiviLayer":
        """Return the cache with the chunk's newest tokens in the ring."""
        return self._with(self.groups, self.recent.settled())

    def _with(self, groups: Groups | PackedPages, recent: Ring) -> "KiviLayer":
        return KiviLayer(groups=groups, recent=recent, kind=self.kind, slots=self.slots)
