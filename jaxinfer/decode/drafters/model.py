"""A second, cheaper model as the drafter: a smaller one, or the target itself under passes (2211.17192, 2309.08168)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.decode.base import State
from jaxinfer.decode.draft import Draft, Known, Outcome
from jaxinfer.decode.drafters.chain import draw_chain
from jaxinfer.decode.once import once
from jaxinfer.decode.verification import chain
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer

_CATCH_UP = 8  # tokens fed at a time after steps without drafts


@nnx.dataclass
class DraftModel(nnx.Module):
    """Tokens drawn one by one from a model that has the target's vocabulary, by the target's own sampling."""

    model: Transformer = nnx.data()
    length: int = nnx.static(default=4, kw_only=True)

    def __post_init__(self):
        if self.length < 1:
            raise InputError(f"length={self.length}: must be at least 1 token")

    @property
    def parents(self) -> tuple[int, ...]:
        """A chain."""
        return chain(self.length)

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> Cache:
        """Return the draft's own cache of the prompts.

        Raises:
            InputError: the cache can't forget as many tokens as are drafted.
        """
        cache = loop.empty_cache(self.model, len(rows), slots)
        if cache.exact_rewind is not None and cache.exact_rewind < self.length:
            raise InputError(
                f"drafts of {self.length} tokens: the draft's cache can only be rewound by {cache.exact_rewind}; "
                "draft fewer"
            )
        return loop.prefill(self.model, cache, rows)[0]

    def propose(
        self,
        model: Transformer,
        own: Cache,
        known: Known,
        state: State,
        keys: Key[Array, "B"],
        width: Int[Array, ""],
        laws: bool,
    ) -> tuple[Draft, Cache]:
        """Return `width` tokens, and their laws where they are wanted; where `width` is 0 do nothing."""
        B, g, V = len(known.length), self.length, self.model.config.vocab_size
        active = ~state.done

        def draft(carry):
            cache = self._caught_up(carry[2], known, active)
            # All that was drafted may have been kept: then the last of it was never fed.
            missing = jnp.where(active, known.length - cache.length, 0)
            hidden, cache = self.model(_newest(known, cache.length, 2), cache, missing)
            hidden = jnp.take_along_axis(hidden, jnp.clip(missing - 1, 0, 1)[:, None, None], axis=1)

            def feed(cache, token, _):
                hidden, cache = self.model(token[:, None], cache, active.astype(jnp.int32))
                return self.model.logits(hidden)[:, 0], cache

            return draw_chain(self.model.logits(hidden)[:, 0], feed, cache, state, keys, width, g, laws)

        nothing = jnp.zeros((B, g), jnp.int32), jnp.zeros((B, g, V)) if laws else None, own
        tokens, found, own = once(width > 0, draft, nothing)
        return Draft(tokens, jnp.full(B, width), found), own

    def _caught_up(self, cache: Cache, known: Known, active: Array) -> Cache:
        """Return the cache with all but the newest one or two tokens in: steps without drafts have left it behind."""

        def missing(cache):
            return jnp.where(active, known.length - cache.length, 0)

        def feed(cache):
            counts = jnp.clip(missing(cache) - 1, 0, _CATCH_UP)
            return self.model(_newest(known, cache.length, _CATCH_UP), cache, counts)[1]

        return jax.lax.while_loop(lambda cache: (missing(cache) > 2).any(), feed, cache)

    def settle(self, own: Cache, known: Known, outcome: Outcome | None) -> Cache:
        """Forget what was not kept. The newest token was never fed."""
        return own.rewind(known.length - 1)


def _newest(known: Known, start: Int[Array, "B"], count: int) -> Int[Array, "B n"]:
    """Return each row's known tokens from start[b] on; what is past the end means nothing."""
    at = jnp.minimum(start[:, None] + jnp.arange(count), known.tokens.shape[1] - 1)
    return jnp.take_along_axis(known.tokens, at, axis=1)
