"""What a cache owes the model: append, attend, rewind; and the whole-model cache that holds one a layer."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.ops.token_tree import TokenTree


@runtime_checkable
class LayerCache(Protocol):
    """The storage of one attention layer. It owns its index algebra; lengths come from the whole-model cache.

    A step is `append`, then `attend` from the tokens just appended. Arrays are `[B, K, S, ...]`, or fewer of these
    axes; a node whose arrays are others has `axes`, which names those of each field as the rules of a mesh do.
    """

    @property
    def exact_rewind(self) -> int | None:
        """How many tokens below the longest that a row has been it can be rewound exactly; None: any number.

        Rewinding to nothing is always exact.
        """

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "LayerCache":
        """Return a cache that also holds the first counts[b] of row b's T new tokens, at positions from start[b]."""

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "LayerCache"]:
        """Attend from queries at absolute `positions`, of which a negative one is padding; with `tree` from its nodes.

        The cache that comes back is the one to append to next: some caches let go, once they have been read, of what
        only this chunk's queries needed, or learn from what the queries looked at.
        """

    def rewind(self, length: Int[Array, "B"]) -> "LayerCache":
        """Return a cache that has forgotten every position >= length[b] of row b."""

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "LayerCache":
        """Return a cache in which a path of the tree that was appended last follows position start[b] - 1, and no more.

        nodes[b, :counts[b]] are its nodes, the root first; node i was appended i slots after start[b].
        """

    def take(self, rows: Int[Array, "n"]) -> "LayerCache":
        """Return a cache of its own, whose row i is a copy of row rows[i]."""

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "LayerCache":
        """Return a cache whose row i goes on from the first length[i] tokens of row rows[i], for up to `room` more.

        Rows may share what they have in common, so none may be appended to below length[i].
        """


@runtime_checkable
class CacheKind(Protocol):
    """How to make an empty layer cache: a frozen, hashable value that sits on an attention node."""

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> LayerCache:
        """Return an empty cache for `batch` rows of up to `slots` tokens."""


@nnx.dataclass
class Cache(nnx.Module):
    """Every layer's cache and, held once, how many tokens each row has."""

    length: Int[Array, "B"] = nnx.data()
    layers: list = nnx.data()  # of LayerCache

    @property
    def exact_rewind(self) -> int | None:
        """How many tokens below the longest that a row has been it can be rewound exactly; None: any number."""
        return min((n for n in (layer.exact_rewind for layer in self.layers) if n is not None), default=None)

    def rewind(self, length: Int[Array, "B"]) -> "Cache":
        """Return a cache in which row b has only its first min(length[b], self.length[b]) tokens."""
        length = jnp.minimum(self.length, length)
        return Cache(length=length, layers=[layer.rewind(length) for layer in self.layers])

    def longer(self, counts: Int[Array, "B"]) -> "Cache":
        """Return the cache with counts[b] more tokens in row b: those that its layers hold already."""
        return Cache(length=self.length + counts, layers=self.layers)

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "Cache":
        """Return a cache of row b's first start[b] tokens and the path nodes[b, :counts[b]] of the tree after them."""
        return Cache(length=start + counts, layers=[layer.keep(start, nodes, counts) for layer in self.layers])

    def take(self, rows: Int[Array, "n"]) -> "Cache":
        """Return a cache of its own, whose row i is a copy of row rows[i]."""
        return Cache(length=self.length[rows], layers=[layer.take(rows) for layer in self.layers])

    def stays(self, rows: Int[np.ndarray, "n"]) -> bool:
        """Return whether row i of a fork is where row rows[i] is, for all i: on one device it is."""
        return all(layer.stays(rows) for layer in self.layers if hasattr(layer, "stays"))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "Cache":
        """Return a cache whose row i goes on from the first length[i] tokens of row rows[i], for up to `room` more.

        A cache in pages shares them, others copy their rows. No row may be appended to below length[i], and each must
        stay where it is: see `stays`, and `take` them to their places where they don't.
        """
        length = jnp.minimum(self.length[rows], length)
        return Cache(length=length, layers=[layer.fork(rows, length, room) for layer in self.layers])
