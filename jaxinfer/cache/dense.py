"""Plain K and V at full precision, one slot a token: the baseline of every other cache."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.ops.attention import attention


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

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "DenseLayer":
        """Write each row's first counts[b] tokens at its own slots; what would pass the last slot is dropped."""
        return DenseLayer(k=_write(self.k, k, start, counts), v=_write(self.v, v, start, counts))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> Float[Array, "B T N H"]:
        """Attend over the live slots."""
        return attention(q, self.k, self.v, positions, scale=scale, window=window, softcap=softcap)

    def rewind(self, length: Int[Array, "B"]) -> "DenseLayer":
        """Nothing to do: a slot past the length is masked by its position and overwritten by the next append."""
        return self


def _write(store: Array, new: Array, start: Array, counts: Array) -> Array:
    B, _, S, _ = store.shape
    T = new.shape[1]
    new = new.astype(store.dtype).transpose(0, 2, 1, 3)  # B K T H
    if T == 1 and B == 1:
        # One slot of one row: an in-place slice update, where a scatter costs a loop.
        slot = jnp.minimum(start[0], S - 1)
        old = jax.lax.dynamic_slice_in_dim(store, slot, 1, axis=2)
        fits = (counts[0] > 0) & (start[0] < S)
        return jax.lax.dynamic_update_slice_in_dim(store, jnp.where(fits, new, old), slot, axis=2)
    if T == 1:
        slots = jnp.where(counts > 0, start, S)  # S is out of range, so the write is dropped
        return store.at[jnp.arange(B), :, slots].set(new[:, :, 0], mode="drop")
    # Many tokens: every slot picks its new token or keeps its own. One pass, no scatter, any start.
    offset = jnp.arange(S)[None] - start[:, None]  # B S
    taken = (offset >= 0) & (offset < counts[:, None])
    picked = jnp.take_along_axis(new, jnp.clip(offset, 0, T - 1)[:, None, :, None], axis=2)
    return jnp.where(taken[:, None, :, None], picked, store)
