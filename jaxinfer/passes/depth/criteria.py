"""When a token may leave the model: rules that look at that token alone, layer by layer.

A rule must not look at other tokens, nor at the batch: then a prompt fed at once leaves where the same prompt leaves
that is fed token by token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.models.layers import Linear
from jaxinfer.passes.depth.influence import cosine

_LOGITS = 1 << 24  # logits that exist at once: 64 MiB in float32


class Seen(NamedTuple):
    """What a criterion may look at after a layer."""

    before: Float[Array, "B T D"]  # what entered the layer
    after: Float[Array, "B T D"]
    normed: Callable[[Array], Array]  # what the model makes of hidden states before it scores tokens
    logits: Callable[[Array], Array]  # of normed states
    vocab: int

    def of_logits(self, measure: Callable[[Array], Array]) -> Array:
        """Return `measure(logits [n, V]) -> [n]` for every token `[B, T]`, of some tokens at a time."""
        B, T, D = self.after.shape
        size = max(1, _LOGITS // self.vocab)
        flat = self.after.reshape(B * T, D)

        def block(x: Float[Array, "n D"]) -> Array:
            return measure(self.logits(self.normed(x[None]))[0])

        if size >= B * T:
            return block(flat).reshape(B, T)
        parts = jnp.pad(flat, ((0, -(B * T) % size), (0, 0))).reshape(-1, size, D)
        return jax.lax.map(block, parts).reshape(-1)[: B * T].reshape(B, T)


@runtime_checkable
class Criterion(Protocol):
    """A rule, with what it remembers of each token from one exit to the next."""

    def start(self, shape: tuple[int, int]) -> Any:
        """Return what it remembers of `[B, T]` tokens before their first exit: a tree of arrays of that shape."""

    def leaves(self, seen: Seen, memory: Any) -> tuple[Bool[Array, "B T"], Any]:
        """Return which tokens may leave, and what it remembers."""


@nnx.dataclass
class Confidence(nnx.Module):
    """A rule that compares a number in 0..1 with a threshold: one above 1 is never reached, 0 always is."""

    threshold: float = nnx.static(kw_only=True)

    def start(self, shape: tuple[int, int]) -> None:
        """Nothing: each exit is judged for itself."""

    def leaves(self, seen: Seen, memory: None) -> tuple[Bool[Array, "B T"], None]:
        """Return where the confidence reaches the threshold."""
        return self.confidence(seen) >= self.threshold, None

    def confidence(self, seen: Seen) -> Float[Array, "B T"]:
        """Return how sure each token is of what it has become."""
        raise NotImplementedError


@nnx.dataclass
class Gap(Confidence):
    """The two largest next-token probabilities are far apart: `p_1 - p_2` (CALM, 2207.07061)."""

    def confidence(self, seen: Seen) -> Float[Array, "B T"]:
        def gap(logits):
            best = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0]
            return best[:, 0] - best[:, 1]

        return seen.of_logits(gap)


@nnx.dataclass
class Entropy(Confidence):
    """The next-token distribution is narrow: `1 - H(p) / log V`."""

    def confidence(self, seen: Seen) -> Float[Array, "B T"]:
        def narrow(logits):
            logp = jax.nn.log_softmax(logits, axis=-1)
            return 1 + (jnp.exp(logp) * logp).sum(axis=-1) / jnp.log(seen.vocab)

        return jnp.maximum(seen.of_logits(narrow), 0)


@nnx.dataclass
class Saturation(Confidence):
    """The layer changed next to nothing: `max(0, cos(x, layer(x)))` (CALM). It needs no logits, so it costs nothing."""

    def confidence(self, seen: Seen) -> Float[Array, "B T"]:
        return jnp.maximum(cosine(seen.before, seen.after), 0)


@nnx.dataclass
class Patience(nnx.Module):
    """The most likely token has stayed the same for `patience` exits in a row (PABEE, 2006.04152); 0: leave at once."""

    patience: int = nnx.static(kw_only=True)

    def start(self, shape: tuple[int, int]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
        """Return no token yet, and for how long it has been the same."""
        return jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32)

    def leaves(self, seen: Seen, memory: tuple[Array, Array]) -> tuple[Bool[Array, "B T"], tuple[Array, Array]]:
        """Return which tokens have waited long enough."""
        last, same = memory
        token = seen.of_logits(lambda logits: jnp.argmax(logits, axis=-1).astype(jnp.int32))
        same = jnp.where(token == last, same + 1, 0)
        return same >= self.patience, (token, same)


@nnx.dataclass
class Head(Confidence):
    """A learned head: `sigmoid(router(norm(x)))`, with the model's last norm. Who trains it puts its weights here."""

    router: Linear = nnx.data()

    def confidence(self, seen: Seen) -> Float[Array, "B T"]:
        return jax.nn.sigmoid(self.router(seen.normed(seen.after)).astype(jnp.float32))[..., 0]
