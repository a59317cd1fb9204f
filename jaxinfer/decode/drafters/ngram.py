"""Prompt lookup: what followed the last few tokens when they came before (2304.04487; LLMA)."""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.decode.base import State
from jaxinfer.decode.draft import Draft, Known, Outcome
from jaxinfer.decode.verification import chain
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer

# About what share of first tokens stood (SmolLM2, 64 summaries and retrievals of Spec-Bench), by the length of the
# match, 1 to 4 and more, and by what came after it before: one thing, once or several times, or several things.
_HOPES = ((0.35, 0.8, 0.15), (0.5, 0.8, 0.3), (0.6, 0.8, 0.3), (0.8, 0.9, 0.45))


@nnx.dataclass
class NGram(nnx.Module):
    """The longest suffix of the text, of `least` to `most` tokens, that has come before: the latest place counts."""

    length: int = nnx.static(default=7, kw_only=True)
    most: int = nnx.static(default=8, kw_only=True)
    least: int = nnx.static(default=1, kw_only=True)

    def __post_init__(self):
        if not (self.length >= 1 and 1 <= self.least <= self.most):
            raise InputError(
                f"length={self.length}, least={self.least}, most={self.most}: must be at least 1, and least <= most"
            )

    @property
    def parents(self) -> tuple[int, ...]:
        """A chain."""
        return chain(self.length)

    @property
    def hopes(self) -> tuple[float, ...]:
        """No match, and then by its length and by what else came after it: several places may agree, or differ."""
        return (0.0, *(hope for by_places in _HOPES[: self.most] for hope in by_places))

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> None:
        """Nothing: all that it needs is known."""

    def propose(
        self,
        model: Transformer,
        own: None,
        known: Known,
        state: State,
        keys: Key[Array, "B"],
        width: Int[Array, ""],
        laws: bool,
    ) -> tuple[Draft, None]:
        """Return what followed in the text."""
        return self.lookup(known), None

    def lookup(self, known: Known) -> Draft:
        """Return what followed; of text that repeats itself, round and round. No tokens where nothing matches."""
        tokens, n = known.tokens, known.length[:, None]
        ends = jnp.arange(tokens.shape[1])  # of earlier matches: the token at an end is the first that followed
        same = jnp.ones(tokens.shape, bool)
        matched = jnp.zeros(tokens.shape, jnp.int32)
        for k in range(1, self.most + 1):
            newest = jnp.take_along_axis(tokens, jnp.maximum(n - k, 0), axis=1)
            before = jnp.pad(tokens, ((0, 0), (k, 0)), constant_values=-1)[:, : tokens.shape[1]]
            same &= (before == newest) & (ends < n)
            matched += same
        best = jnp.argmax(matched * tokens.shape[1] + ends, axis=1)[:, None]  # the longest, and of those the latest
        longest = jnp.take_along_axis(matched, best, axis=1)
        period = jnp.maximum(n - best, 1)
        drafted = jnp.take_along_axis(tokens, best + jnp.arange(self.length) % period, axis=1)
        equals = (matched == longest) & (ends < n)
        split = (equals & (tokens != drafted[:, :1])).any(axis=1)
        places = jnp.where(split, 2, (equals.sum(axis=1) > 1).astype(jnp.int32))
        longest = longest[:, 0]
        trust = jnp.where(longest > 0, 3 * jnp.minimum(longest, len(_HOPES)) - 2 + places, 0)
        return Draft(drafted, jnp.where(longest >= self.least, self.length, 0), trust=trust)

    def settle(self, own: None, known: Known, outcome: Outcome | None) -> None:
        """Nothing to forget."""
