"""What a cache owes the model: append, attend, rewind; and the whole-model cache that holds one a layer."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int


@runtime_checkable
class LayerCache(Protocol):
    """The storage of one attention layer. It owns its index algebra; lengths come from the whole-model cache."""

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
    ) -> Float[Array, "B T N H"]:
        """Attend from queries at absolute `positions`; a negative position is padding."""

    def rewind(self, length: Int[Array, "B"]) -> "LayerCache":
        """Return a cache that has forgotten every position >= length[b] of row b."""


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

    def rewind(self, length: Int[Array, "B"]) -> "Cache":
        """Return a cache in which row b has only its first min(length[b], self.length[b]) tokens."""
        length = jnp.minimum(self.length, length)
        return Cache(length=length, layers=[layer.rewind(length) for layer in self.layers])
