"""The newest tokens of each row in a ring, whatever comes before them: the recent part of the caches that let go."""

import functools
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxinfer.cache.slots import pick, ring_positions, write
from jaxinfer.errors import InputError
from jaxinfer.ops.attention import QUERY_BLOCK, Share, share
from jaxinfer.ops.online_attention import merge
from jaxinfer.ops.token_tree import TokenTree

SLACK = 32  # tokens beyond those that queries read, at least: by so many a row can be rewound


@nnx.dataclass
class Chunk(nnx.Module):
    """The tokens that were appended last, where they are too many for the ring: their own queries need them."""

    k: Float[Array, "B K T H"] = nnx.data()
    v: Float[Array, "B K T H"] = nnx.data()
    start: Int[Array, "B"] = nnx.data()
    counts: Int[Array, "B"] = nnx.data()


@nnx.dataclass
class Ring(nnx.Module):
    """R slots, of which position s is in slot s mod R; its queries read at most R - SLACK tokens back."""

    k: Float[Array, "B K R H"] = nnx.data()
    v: Float[Array, "B K R H"] = nnx.data()
    chunk: Chunk | None = nnx.data(default=None)  # between append and attend
    stores: ClassVar[tuple[str, ...]] = ("k", "v")  # see `rotated`

    @classmethod
    def empty(cls, batch: int, kv_heads: int, size: int, head_dim: int, dtype: DTypeLike) -> "Ring":
        """Return a ring of `size` slots that holds zeros."""
        k, v = (jnp.zeros((batch, kv_heads, size, head_dim), dtype) for _ in range(2))  # two: either may be donated
        return cls(k=k, v=v)

    @property
    def size(self) -> int:
        """How many slots a row has."""
        return self.k.shape[2]

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "Ring":
        """Return the ring with a chunk: each row's first counts[b] new tokens, at positions from start[b]."""
        base = self.settled()
        k, v = (x.astype(self.k.dtype).transpose(0, 2, 1, 3) for x in (k, v))
        return Ring(k=base.k, v=base.v, chunk=Chunk(k=k, v=v, start=start, counts=counts))

    def settled(self) -> "Ring":
        """Return the ring with the chunk's newest tokens in its slots."""
        if self.chunk is None:
            return self
        c, R = self.chunk, self.size
        if c.k.shape[2] == 1:
            k, v = (write(ring, new, c.start % R, c.counts) for ring, new in ((self.k, c.k), (self.v, c.v)))
        else:
            offset = ring_positions(c.start + c.counts, R) - c.start[:, None]
            k, v = (pick(ring, new, offset, c.counts) for ring, new in ((self.k, c.k), (self.v, c.v)))
        return Ring(k=k, v=v)

    def settled_if_few(self) -> "Ring":
        """Return the ring settled where its new tokens leave in it all that their queries read."""
        few = self.chunk is not None and self.chunk.k.shape[2] <= SLACK
        return self.settled() if few else self

    def at(self, positions: Int[Array, "B n"]) -> tuple[Float[Array, "B n K H"], Float[Array, "B n K H"]]:
        """Return the keys and values of some positions."""
        k, v = (x.transpose(0, 2, 1, 3) for x in self.read(positions))
        return k, v

    def read(self, positions: Int[Array, "B n"]) -> tuple[Float[Array, "B K n H"], Float[Array, "B K n H"]]:
        """Return the keys and values of some positions, in the slots or the chunk, by heads."""
        slots, c = (positions % self.size)[:, None, :, None], self.chunk
        k, v = (jnp.take_along_axis(x, slots, axis=2) for x in (self.k, self.v))
        if c is None:
            return k, v
        offset = positions - c.start[:, None]
        return pick(k, c.k, offset, c.counts), pick(v, c.v, offset, c.counts)

    def held(self, positions: Int[Array, "B T"]) -> Int[Array, "B R"]:
        """Return the position in each slot, negative where there is none, when queries at `positions` attend."""
        end = positions[:, 0] + (positions >= 0).sum(axis=1) if self.chunk is None else self.chunk.start
        return ring_positions(end, self.size)

    def share(
        self,
        q: Float[Array, "B K GT H"],
        held: Int[Array, "B R"],
        first: Int[Array, ""],
        reach: int,
        sees: Callable[[Int[Array, "b S"]], Bool[Array, "B T S"]],
        softcap: float | None,
    ) -> Share:
        """Return what the ring and the chunk contribute to the attention of a block of queries.

        The block begins with query `first` of those that were appended. `held` is what `held` says of all of them; of
        the positions in slots, each query sees those that `sees` says, none that is negative or over `reach` back.
        """
        found = share(q, self.k, self.v, sees(held), softcap)
        if self.chunk is None:
            return found
        k, v, near = self._near(first, reach)
        return merge(found, share(q, k, v, sees(near), softcap))

    def take(self, rows: Int[Array, "n"]) -> "Ring":
        """Copy the rows."""
        base = self.settled()
        return Ring(k=base.k[rows], v=base.v[rows])

    def _near(self, first: Array, reach: int) -> tuple[Array, Array, Array]:
        """Return the chunk's tokens that a block of queries may read, with their positions."""
        T = self.chunk.k.shape[2]
        size = min(T, QUERY_BLOCK + reach)
        begin = jnp.clip(first - reach, 0, T - size)
        offset = begin + jnp.arange(size)[None]
        slots = jnp.where(offset < self.chunk.counts[:, None], self.chunk.start[:, None] + offset, -1)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=size, axis=2)
        return cut(self.chunk.k), cut(self.chunk.v), slots


def append_to_ring(
    k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Callable[[Ring, Array, Array], tuple[None, Ring]]:
    """Return what puts new tokens into a ring by XLA: the `put` of a cache's `append_by`, see `rotated`."""
    return lambda ring, start, counts: (None, ring.append(k, v, start, counts).settled_if_few())


def check_tree(tree: TokenTree | None, nodes: int, most: int, why: str = "", fix: str = "") -> None:
    """Raise InputError where a tree has more nodes than a cache takes, which would leave the ring too soon."""
    if tree is not None and nodes > most:
        raise InputError(f"a tree of {nodes} nodes: this cache{why} takes at most {most}; draft fewer{fix}")
