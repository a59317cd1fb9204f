"""The model's own guesses at tokens further ahead, gathered step by step (lookahead decoding, 2402.02057).

A pass carries, beside the drafts, a window of guesses: `levels` rows of `window` columns. Row 0 is a chain of guesses
at the next tokens, and what the model says after a guess becomes the guess below it (Jacobi iteration). A column that
has been through all rows is an n-gram that the model has written; the newest of those that begin with the newest token
are the next drafts. In a tree of tokens all of this is one mask.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.decode.base import State
from jaxinfer.decode.draft import Draft, Known, Outcome
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.token_tree import TokenTree


@nnx.dataclass
class Pool(nnx.Module):
    """Each row's guesses, and the n-grams that it found, the newest in the place before `next`."""

    levels: Int[Array, "B r c"] = nnx.data()
    grams: Int[Array, "B P n"] = nnx.data()
    next: Int[Array, ""] = nnx.data()


@nnx.dataclass
class Lookahead(nnx.Module):
    """Drafts of `levels` tokens, `drafts` at a time, from n-grams of one token more."""

    window: int = nnx.static(default=4, kw_only=True)
    levels: int = nnx.static(default=3, kw_only=True)
    drafts: int = nnx.static(default=3, kw_only=True)
    pool: int = nnx.static(default=512, kw_only=True)  # n-grams that are kept for each row

    def __post_init__(self):
        if min(self.window, self.levels, self.drafts) < 1 or self.pool < self.window:
            raise InputError(
                f"window={self.window}, levels={self.levels}, drafts={self.drafts}, pool={self.pool}: must be at least "
                "1, and the pool hold a window"
            )

    @property
    def parents(self) -> tuple[int, ...]:
        """The drafts, and then the window: guesses that happen to be right stand as drafts do."""
        found = [-1]
        for _ in range(self.drafts):
            found += [0, *range(len(found), len(found) + self.levels - 1)]
        start = len(found)
        for row in range(self.levels):
            for column in range(self.window):
                node = start + row * self.window + column
                found.append(node - self.window if row else node - 1 if column else 0)
        return tuple(found)

    @property
    def widths(self) -> tuple[int, ...]:
        """All or nothing: without its window a pass finds no n-grams for the next ones."""
        return 0, len(self.parents) - 1

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> Pool:
        """Return guesses that are drawn from each prompt, and a pool with nothing in it."""
        levels = np.zeros((len(rows), self.levels, self.window), np.int32)
        for b, row in enumerate(rows):
            if len(row):
                levels[b] = np.random.default_rng(len(row)).choice(np.asarray(row), levels.shape[1:])
        grams = jnp.full((len(rows), self.pool, self.levels + 1), -1, jnp.int32)
        return Pool(levels=jnp.asarray(levels), grams=grams, next=jnp.int32(0))

    def propose(
        self,
        model: Transformer,
        own: Pool,
        known: Known,
        state: State,
        keys: Key[Array, "B"],
        width: Int[Array, ""],
        laws: bool,
    ) -> tuple[Draft, Pool]:
        """Return the newest n-grams that begin with the newest token, and the window."""
        B = len(state.last)
        age = (own.next - 1 - jnp.arange(self.pool)) % self.pool
        fits = own.grams[:, :, 0] == state.last[:, None]
        newest = jax.lax.top_k(jnp.where(fits, self.pool - age, 0), self.drafts)[1]
        drafts = jnp.take_along_axis(own.grams, newest[..., None], axis=1)
        # Where too few grams fit, token 0 stands in their place.
        drafts = jnp.where((drafts[..., :1] == state.last[:, None, None]), drafts[..., 1:], 0)
        tokens = jnp.concatenate([drafts.reshape(B, -1), own.levels.reshape(B, -1)], axis=1)
        return Draft(tokens, jnp.full(B, tokens.shape[1])), own

    def settle(self, own: Pool, known: Known, outcome: Outcome | None) -> Pool:
        """Put what the window has found into the pool, and what the model said below its last row in the window."""
        if outcome is None:
            return own
        nodes, W = len(self.parents), self.window
        below = outcome.best[:, nodes - W : nodes]
        grams = jnp.concatenate([own.levels, below[:, None]], axis=1).swapaxes(1, 2)  # [B, W, n]
        whole = outcome.count == nodes - 1  # a pass that was cut short has seen no window
        at = (own.next + jnp.arange(W)) % self.pool
        kept = jnp.where(whole[:, None, None], grams, own.grams[:, at])
        # Row 1 becomes row 0, one token further on; where more tokens stood, guesses at those leave on the left.
        further = jnp.asarray(TokenTree.of(self.parents).depth)[outcome.last][:, None]
        levels = jnp.concatenate([own.levels[:, 1:], below[:, None]], axis=1)
        levels = jnp.take_along_axis(levels, ((jnp.arange(W) + further) % W)[:, None], axis=2)
        return Pool(
            levels=jnp.where(whole[:, None, None], levels, own.levels),
            grams=own.grams.at[:, at].set(kept),
            next=(own.next + W) % self.pool,
        )
