"""A row's first tokens and its newest ones, and nothing between (StreamingLLM, 2309.17453).

A query at position p reads the `sinks` first tokens and those from p - window + 1 on. That depends on p alone: a prompt
fed at once gives what the same prompt fed token by token gives. Positions are those in the cache, not those in the
text: to a query the sinks are as far away as if nothing had been let go between.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.dense import Dense, DenseLayer
from jaxinfer.cache.ring import SLACK, Ring, append_to_ring, check_tree
from jaxinfer.cache.slots import take_rows
from jaxinfer.errors import InputError
from jaxinfer.ops.attention import by_query_blocks, group_heads, share, ungroup_heads, visible
from jaxinfer.ops.hadamard import hadamard_transform
from jaxinfer.ops.online_attention import merge
from jaxinfer.ops.rope import RopeConfig, turn
from jaxinfer.ops.token_tree import TokenTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
    """The kind of cache that holds the first `sinks` tokens and a ring of the newest `window`."""

    sinks: int
    window: int
    rope: RopeConfig  # by which queries are turned towards the sinks
    hadamard: bool = False  # whether queries and keys come with a Hadamard transform over them

    def __post_init__(self):
        if self.sinks < 0 or self.window < 1:
            raise InputError(f"sinks={self.sinks}, window={self.window}: must be at least 0 and 1 tokens")

    def create(
        self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> "StreamingLayer | DenseLayer":
        """Return an empty cache, of all tokens where they are no more than the window."""
        if slots <= self.window:
            return Dense().create(batch, slots, kv_heads, head_dim, dtype)
        first = (jnp.zeros((batch, kv_heads, self.sinks, head_dim), dtype) for _ in range(2))
        recent = Ring.empty(batch, kv_heads, min(slots, self.window + SLACK), head_dim, dtype)
        return StreamingLayer(*first, recent, kind=self, slots=slots)


@nnx.dataclass
class StreamingLayer(nnx.Module):
    """The sinks, in the slots of their positions, and the recent tokens, in a ring that sinks go through as well."""

    k: Float[Array, "B K A H"] = nnx.data()
    v: Float[Array, "B K A H"] = nnx.data()
    recent: Ring = nnx.data()
    kind: Streaming = nnx.static(kw_only=True)
    slots: int = nnx.static(kw_only=True)

    @property
    def exact_rewind(self) -> int | None:
        """As many tokens as the ring holds beyond the window."""
        return None if self.slots <= self.recent.size else self.recent.size - self.kind.window

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "StreamingLayer":
        """Put each row's first counts[b] new tokens into the ring, and those that are sinks into their slots too."""
        return self.append_by(append_to_ring(k, v), k.shape[1], start, counts)[1]

    def append_by(
        self, put: Callable[..., Any], tokens: int, start: Int[Array, "B"], counts: Int[Array, "B"]
    ) -> tuple[Any, "StreamingLayer"]:
        """Do what `append` does, where `put` writes the tokens to the ring: see `rotated`."""
        del tokens
        counts = jnp.clip(self.slots - start, 0, counts)
        found, recent = put(self.recent, start, counts)
        slots = jnp.broadcast_to(jnp.arange(self.kind.sinks), (len(start), self.kind.sinks))
        new = slots >= start[:, None]  # those past the new tokens are seen by none before they are new as well
        sinks = zip(recent.read(slots), (self.k, self.v), strict=True)
        return found, self._with(*(jnp.where(new[:, None, :, None], x, old) for x, old in sinks), recent)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "StreamingLayer"]:
        """Attend over the sinks, with queries that are turned towards them, and over the recent tokens."""
        kind, heads, held = self.kind, self.k.shape[1], self.recent.held(positions)
        check_tree(tree, q.shape[1], SLACK)
        reach = kind.window if window is None else min(window, kind.window)

        def attend(q: Array, positions: Array, first: Array, turned: Array) -> Array:
            def sees(slots: Array) -> Array:
                return visible(positions, slots, reach, tree) & (slots >= kind.sinks)[:, None]

            found = self.recent.share(group_heads(q, heads, scale), held, first, reach, sees, softcap)
            if kind.sinks:
                seen = visible(positions, jnp.arange(kind.sinks)[None], window, tree)
                seen = jnp.broadcast_to(seen, (*positions.shape, kind.sinks))
                found = merge(found, share(group_heads(turned, heads, scale), self.k, self.v, seen, softcap))
            return ungroup_heads(found, q)

        return by_query_blocks(attend, q, positions, self._turned(q, positions)), self._settled()

    def rewind(self, length: Int[Array, "B"]) -> "StreamingLayer":
        """Nothing to do but to let go of the chunk: what lies past the length is masked, and written again."""
        return self._settled()

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "StreamingLayer":
        """Append the path anew, in place of the tree."""
        base = self._settled()
        return base.append(*base.recent.at(start[:, None] + nodes), start, counts)._settled()

    def take(self, rows: Int[Array, "n"]) -> "StreamingLayer":
        """Copy the rows."""
        return self._with(*take_rows((self.k, self.v), rows), self.recent.take(rows))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "StreamingLayer":
        """Copy the rows: nothing is shared."""
        return self.take(rows)

    def _turned(self, q: Array, positions: Array) -> Array:
        """Return the queries as at the last position of a cache that has let go of all that they don't read."""
        back = jnp.minimum(positions, self.kind.sinks + self.kind.window - 1) - positions
        if not self.kind.hadamard:
            return turn(q, back, positions, self.kind.rope)
        return hadamard_transform(turn(hadamard_transform(q, transpose=True), back, positions, self.kind.rope))

    def _settled(self) -> "StreamingLayer":
        return self._with(self.k, self.v, self.recent.settled())

    def _with(self, k: Array, v: Array, recent: Ring) -> "StreamingLayer":
        return StreamingLayer(k, v, recent, kind=self.kind, slots=self.slots)
