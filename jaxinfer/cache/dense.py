"""Plain K and V at full precision, one slot a token: the baseline of every other cache."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.slots import move, take_rows, write
from jaxinfer.ops.attention import attention
from jaxinfer.ops.attention_parts import Part, attention_part
from jaxinfer.ops.token_tree import TokenTree


@dataclasses.dataclass(frozen=True)
class Dense:
    """The kind of cache that keeps everything."""

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "DenseLayer":
        """Return an empty cache; zeros, so that nothing uninitialized is ever read."""
        shape = (batch, kv_heads, slots, head_dim)
        return DenseLayer(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


@nnx.dataclass
class DenseLayer(nnx.Module):
    """Keys and values `[B, K, S, H]`; slot s holds position s, so each head reads its slots contiguously."""

    k: Float[Array, "B K S H"] = nnx.data()
    v: Float[Array, "B K S H"] = nnx.data()
    stores: ClassVar[tuple[str, ...]] = ("k", "v")  # see `rotated`

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
    ) -> "DenseLayer":
        """Write each row's first counts[b] tokens at its own slots; what would pass the last slot is dropped."""
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        return DenseLayer(k=write(self.k, k, start, counts), v=write(self.v, v, start, counts))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "DenseLayer"]:
        """Attend over the live slots."""
        return attention(q, self.k, self.v, positions, scale=scale, window=window, softcap=softcap, tree=tree), self

    def attend_part(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        first_slot: Int[Array, ""],
        **options: Any,
    ) -> Part:
        """Attend over the live slots as those from position `first_slot` on, a part of what the queries see."""
        return attention_part(q, self.k, self.v, positions, first_slot, **options)

    def rewind(self, length: Int[Array, "B"]) -> "DenseLayer":
        """Nothing to do: a slot past the length is masked by its position and overwritten by the next append."""
        return self

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "DenseLayer":
        """Move the path's tokens to the slots of their positions."""
        return jax.tree.map(lambda store: move(store, start, nodes, counts), self)

    def take(self, rows: Int[Array, "n"]) -> "DenseLayer":
        """Copy the rows."""
        return take_rows(self, rows)

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "DenseLayer":
        """Copy the rows: nothing is shared."""
        return take_rows(self, rows)
