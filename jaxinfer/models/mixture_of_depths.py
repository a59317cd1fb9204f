"""Mixture of depths: a block that only some tokens of a sequence go through; the others pass beside it (2404.02258).

In training the tokens of largest router score go through, as many as the capacity allows. That looks ahead: whether a
token is among them depends on later ones. In sampling each token is judged alone, by a predictor of that choice.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.ops.token_tree import TokenTree

Routing = Literal["top_k", "causal"]


@nnx.dataclass
class MixtureOfDepths(nnx.Module):
    """`x + g(x) (block(x) - x)` of the tokens that are taken, `x` of the others; `g(x) = w x + b`, the router's score.

    The tokens that are taken attend to each other, each at its own position. A window of the block counts those only.
    With b = 1 and w = 0 the gate is one, and a capacity of 1 gives the block itself.
    """

    block: nnx.Module = nnx.data()
    router: Linear = nnx.data()
    predictor: Linear = nnx.data()  # whether the router's choice takes a token: where this is 0 or more
    capacity: float = nnx.static(kw_only=True)  # share of the tokens that `top_k` takes
    routing: Routing = nnx.static(kw_only=True)

    @property
    def attention(self) -> "MixtureOfDepths":
        """Whatever makes this layer's cache: itself."""
        return self

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike) -> "TakenLayer":
        """Return the block's cache, and no token taken."""
        inner = self.block.attention.init_cache(batch, slots, dtype)
        return TakenLayer(inner, jnp.zeros((batch, slots), bool), jnp.zeros((batch,), jnp.int32))

    def routed(self, routing: Routing) -> "MixtureOfDepths":
        """Return the same layer with the other routing."""
        return MixtureOfDepths(self.block, self.router, self.predictor, capacity=self.capacity, routing=routing)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: "TakenLayer",
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T D"], "TakenLayer"]:
        if tree is not None:
            raise InputError("a mixture of depths under a tree of tokens: not supported; draft chains")
        takes = self.takes(x, positions)
        size = self._room(x.shape[1]) if self.routing == "top_k" else x.shape[1]
        cache = cache.taking(takes, start)
        number = takes.sum(axis=1, dtype=jnp.int32)
        order = jnp.argsort(~takes, axis=1, stable=True)[:, :size]  # those that are taken first, in their own order
        there = jnp.arange(size) < number[:, None]
        rows = jnp.arange(len(x))[:, None]

        def run(x, cache):
            old = x[rows, order]
            new, cache = self.block(old, jnp.where(there, positions[rows, order], -1), cache, start, number)
            change = jnp.where(there[..., None], self.router(old) * (new - old), 0)
            return x.at[rows, order].add(change.astype(x.dtype)), cache

        return jax.lax.cond(takes.any(), run, lambda x, cache: (x, cache), x, cache)

    def takes(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Bool[Array, "B T"]:
        """Return which tokens go through the block; padding, at negative positions, does not."""
        real = positions >= 0
        if self.routing == "causal":
            return real & (self.predictor(x)[..., 0] >= 0)
        scores = jnp.where(real, self.router(x)[..., 0].astype(jnp.float32), -jnp.inf)
        best = jax.lax.top_k(scores, self._room(x.shape[1]))[1]
        return real & jnp.zeros(real.shape, bool).at[jnp.arange(len(x))[:, None], best].set(True)

    def predictor_loss(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Return the cross entropy of the predictor with what `top_k` takes of whole sequences, and its accuracy.

        Its gradient reaches the predictor alone.
        """
        x = jax.lax.stop_gradient(x)
        positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
        taken = self.routed("top_k").takes(x, positions)
        score = self.predictor(x)[..., 0].astype(jnp.float32)
        loss = jnp.where(taken, jax.nn.softplus(-score), jax.nn.softplus(score)).mean()
        return loss, ((score >= 0) == taken).mean()

    def _room(self, tokens: int) -> int:
        return min(tokens, max(1, math.ceil(self.capacity * tokens - 1e-9)))


@nnx.dataclass
class TakenLayer(nnx.Module):
    """The cache of the tokens that a layer took, one after the other: the n-th of a row is at the inner position n."""

    inner: nnx.Module = nnx.data()
    taken: Bool[Array, "B S"] = nnx.data()  # which of a row's positions
    base: Int[Array, "B"] = nnx.data()  # how many before the last chunk

    @property
    def exact_rewind(self) -> int | None:
        """What the cache inside has: of so many tokens the layer took as many at most."""
        return self.inner.exact_rewind

    def taking(self, takes: Bool[Array, "B T"], start: Int[Array, "B"]) -> "TakenLayer":
        """Return the cache before the tokens of a chunk from start[b] that `takes` says are appended."""
        slots = start[:, None] + jnp.arange(takes.shape[1])
        before = self.taken & (jnp.arange(self.taken.shape[1]) < start[:, None])
        taken = before.at[jnp.arange(len(takes))[:, None], slots].set(takes, mode="drop")
        return TakenLayer(self.inner, taken, before.sum(axis=1, dtype=jnp.int32))

    def append(self, k: Array, v: Array, start: Array, counts: Array) -> "TakenLayer":
        """Append the first counts[b] tokens after those that the layer has."""
        return TakenLayer(self.inner.append(k, v, self.base, counts), self.taken, self.base)

    def attend(self, q: Array, positions: Int[Array, "B T"], **options: Any) -> tuple[Array, "TakenLayer"]:
        """Attend to the tokens that were taken up to each query's own."""
        at = jnp.where(positions >= 0, self.base[:, None] + jnp.arange(positions.shape[1], dtype=jnp.int32), -1)
        y, inner = self.inner.attend(q, at, **options)
        return y, TakenLayer(inner, self.taken, self.base)

    def rewind(self, length: Int[Array, "B"]) -> "TakenLayer":
        """Forget what was taken at positions from length[b]."""
        taken = self.taken & (jnp.arange(self.taken.shape[1]) < length[:, None])
        return TakenLayer(self.inner.rewind(taken.sum(axis=1, dtype=jnp.int32)), taken, self.base)

    def keep(self, start: Array, nodes: Array, counts: Array) -> "TakenLayer":
        """Refuse: no tree is ever appended."""
        raise InputError("a mixture of depths under a tree of tokens: not supported; draft chains")

    def take(self, rows: Int[Array, "n"]) -> "TakenLayer":
        """Copy rows, and what they took."""
        return TakenLayer(self.inner.take(rows), self.taken[rows], self.base[rows])

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "TakenLayer":
        """Fork rows: of the first length[i] tokens, as many as the layer took."""
        taken = self.taken[rows] & (jnp.arange(self.taken.shape[1]) < length[:, None])
        count = taken.sum(axis=1, dtype=jnp.int32)
        return TakenLayer(self.inner.fork(rows, count, room), taken, self.base[rows])
