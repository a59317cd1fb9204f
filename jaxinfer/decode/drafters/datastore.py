"""What followed the last few tokens in a corpus, found through its suffix array (REST, 2311.08252)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.decode.base import State
from jaxinfer.decode.draft import Draft, Known, Outcome
from jaxinfer.decode.pace import HOPE
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer


@nnx.dataclass
class Datastore(nnx.Module):
    """Continuations of the longest suffix of the text, of `least` to `most` tokens, that the corpus has.

    `branches` of them, evenly spaced among all places in the order of what follows, each a chain of `length` tokens:
    what follows often is likely to be among them.
    """

    corpus: Int[Array, "M"] = nnx.data()
    order: Int[Array, "M"] = nnx.data()  # the suffix array: where the corpus's suffixes start, sorted
    length: int = nnx.static(default=4, kw_only=True)
    branches: int = nnx.static(default=2, kw_only=True)
    most: int = nnx.static(default=6, kw_only=True)
    least: int = nnx.static(default=2, kw_only=True)

    def __post_init__(self):
        if not (self.length >= 1 and self.branches >= 1 and 1 <= self.least <= self.most):
            raise InputError(
                f"length={self.length}, branches={self.branches}, least={self.least}, most={self.most}: must be at "
                "least 1, and least <= most"
            )

    @classmethod
    def of(cls, tokens: Sequence[int] | Int[np.ndarray, "M"], **options) -> "Datastore":
        """Return the drafter of a corpus of at least two tokens.

        Raises:
            InputError: a shorter corpus, or an option out of its range.
        """
        tokens = np.asarray(tokens, np.int32)
        if len(tokens) < 2:
            raise InputError(f"a datastore of {len(tokens)} tokens: must be at least 2; give a longer text")
        return cls(jnp.asarray(tokens), jnp.asarray(suffix_array(tokens)), **options)

    @property
    def parents(self) -> tuple[int, ...]:
        """Chains side by side."""
        found = [-1]
        for _ in range(self.branches):
            found += [0, *range(len(found), len(found) + self.length - 1)]
        return tuple(found)

    @property
    def hopes(self) -> tuple[float, ...]:
        """A class for each length of a match, and nothing known of any."""
        return (HOPE,) * (self.most + 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Whole branches: none, one, all."""
        return tuple(dict.fromkeys((0, self.length, self.length * self.branches)))

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
        """Return continuations."""
        return self.lookup(known), None

    def lookup(self, known: Known) -> Draft:
        """Return continuations from the corpus; no tokens where nothing matches."""
        first, count, matched = jax.vmap(self._longest)(known.tokens, known.length)
        step = jnp.arange(self.branches)
        at = first[:, None] + (step * jnp.maximum(count, 1)[:, None]) // self.branches
        start = self.order[at] + matched[:, None]
        follow = jnp.minimum(start[..., None] + jnp.arange(self.length), len(self.corpus) - 1)
        tokens = self.corpus[follow].reshape(len(first), -1)
        return Draft(tokens, jnp.where(matched > 0, tokens.shape[1], 0), trust=matched)

    def _longest(self, tokens: Int[Array, "n"], length: Int[Array, ""]) -> tuple[Array, Array, Array]:
        """Return the first place in `order` of the longest match of one row, how many there are, and its tokens."""
        found = (jnp.int32(0), jnp.int32(0), jnp.int32(0))
        for size in range(self.least, self.most + 1):
            pattern = jax.lax.dynamic_slice(tokens, (jnp.maximum(length - size, 0),), (size,))
            low, high = (self._bound(pattern, after) for after in (False, True))
            better = (high > low) & (length >= size)
            found = tuple(jnp.where(better, new, old) for new, old in zip((low, high - low, size), found, strict=True))
        return found

    def _bound(self, pattern: Int[Array, "n"], after: bool) -> Int[Array, ""]:
        """Return how many suffixes come before the pattern, or also those that begin with it, by bisection."""
        M, size = len(self.corpus), pattern.shape[0]

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) // 2
            at = self.order[jnp.minimum(middle, M - 1)] + jnp.arange(size)
            there = jnp.where(at < M, self.corpus[jnp.minimum(at, M - 1)], -1)  # a suffix that ends comes first
            differs = there != pattern
            where = jnp.argmax(differs)
            before = jnp.where(differs.any(), there[where] < pattern[where], after)
            before &= middle < high
            return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

        steps = int(M).bit_length()
        return jax.lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(M)))[0]

    def settle(self, own: None, known: Known, outcome: Outcome | None) -> None:
        """Nothing to forget."""


def suffix_array(tokens: Int[np.ndarray, "M"]) -> Int[np.ndarray, "M"]:
    """Return where the suffixes of `tokens` start, in their order: by doubling the length that is sorted."""
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64)
    size, M = 1, len(tokens)
    while True:
        later = np.full(M, -1, np.int64)
        later[: M - size] = rank[size:]
        key = rank * (M + 1) + later + 1
        order = np.argsort(key, kind="stable")
        changed = np.diff(key[order], prepend=key[order[0]]) != 0
        rank = np.empty(M, np.int64)
        rank[order] = np.cumsum(changed)
        if rank.max() == M - 1:
            return order.astype(np.int32)
        size *= 2
