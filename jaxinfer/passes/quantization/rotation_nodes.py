"""The nodes that rotation passes put in: rotations, and what applies one while the model runs."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.base import LayerCache
from jaxinfer.cache.streaming import Streaming
from jaxinfer.models.layers import Leaf, RMSNorm
from jaxinfer.models.transformer import Attention
from jaxinfer.ops.hadamard import hadamard_transform
from jaxinfer.ops.token_tree import TokenTree


@nnx.dataclass
class SignedHadamard(nnx.Module):
    """`x diag(signs) H`: a random rotation that costs O(D log D) and stores D signs."""

    signs: Leaf = nnx.data()

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return hadamard_transform(x * self.signs.astype(x.dtype))

    def inverse(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Undo the rotation."""
        return hadamard_transform(x, transpose=True) * self.signs.astype(x.dtype)


@nnx.dataclass
class Orthogonal(nnx.Module):
    """`x R` with a stored orthogonal matrix."""

    matrix: Leaf = nnx.data()

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = jnp.matmul(x, self.matrix.astype(x.dtype), precision="highest", preferred_element_type=jnp.float32)
        return y.astype(x.dtype)

    def inverse(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Undo the rotation."""
        return Orthogonal(self.matrix.T)(x)


@nnx.dataclass
class RotatedNorm(RMSNorm):
    """A norm whose gain could not be folded away: it works in the model's own basis, and its output is rotated.

    With `rotated_input` what it reads is rotated as well, and is turned back first.
    """

    rotations: list[nnx.Module] = nnx.data(kw_only=True)  # applied from left to right
    rotated_input: bool = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        for rotation in reversed(self.rotations) if self.rotated_input else ():
            x = rotation.inverse(x)
        x = super().__call__(x)
        for rotation in self.rotations:
            x = rotation(x)
        return x

    def after(
        self, x: Float[Array, "*B D"], y: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Return `x + y` and the norm of it."""
        total = x + y
        return total, self(total)


@nnx.dataclass
class HadamardLinear(nnx.Module):
    """`linear(x H)` over all contracted axes as one; `linear` holds `H^T W`, so that H cancels."""

    linear: nnx.Module = nnx.data()

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        return self.linear(hadamard_transform(x.reshape(*x.shape[:2], -1)).reshape(x.shape))


@nnx.dataclass
class HadamardExperts(nnx.Module):
    """`HadamardLinear` for one projection of every expert."""

    experts: nnx.Module = nnx.data()

    def __call__(self, rows: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        return self.experts(hadamard_transform(rows), group_sizes)


@nnx.dataclass
class RotatedKeys(Attention):
    """Attention that stores rotated keys, in whatever kind of cache it is given."""

    o: nnx.Module = nnx.data()  # a linear map, or one with a rotation before it

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike) -> LayerCache:
        kind = dataclasses.replace(self.cache, hadamard=True) if isinstance(self.cache, Streaming) else self.cache
        return RotatedKeysLayer(kind.create(batch, slots, self.num_kv_heads, self.head_dim, dtype))


@nnx.dataclass
class RotatedKeysLayer(nnx.Module):
    """A layer's cache behind a Hadamard rotation of each head's keys and queries: scores stay, `(q H)(k H)^T = q k^T`.

    It comes after the rotary embedding, with which it does not commute, so it can't be absorbed into kernels.
    """

    inner: nnx.Module = nnx.data()

    @property
    def exact_rewind(self) -> int | None:
        """What the cache inside has."""
        return self.inner.exact_rewind

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "RotatedKeysLayer":
        """Append the rotated keys."""
        return RotatedKeysLayer(self.inner.append(hadamard_transform(k), v, start, counts))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "RotatedKeysLayer"]:
        """Attend with the rotated queries."""
        options = dict(scale=scale, window=window, softcap=softcap, tree=tree)
        y, inner = self.inner.attend(hadamard_transform(q), positions, **options)
        return y, RotatedKeysLayer(inner)

    def rewind(self, length: Int[Array, "B"]) -> "RotatedKeysLayer":
        """Rewind the cache inside."""
        return RotatedKeysLayer(self.inner.rewind(length))

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "RotatedKeysLayer":
        """Keep a path in the cache inside."""
        return RotatedKeysLayer(self.inner.keep(start, nodes, counts))

    def take(self, rows: Int[Array, "n"]) -> "RotatedKeysLayer":
        """Copy rows of the cache inside."""
        return RotatedKeysLayer(self.inner.take(rows))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "RotatedKeysLayer":
        """Fork rows of the cache inside."""
        return RotatedKeysLayer(self.inner.fork(rows, length, room))
