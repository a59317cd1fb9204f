"""A second, cheaper model as the drafter: a smaller one, or the target itself under passes (2211.17192, 2309.08168)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.decode.base import State
from jaxinfer.decode.speculative import Draft, Known
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer


@nnx.dataclass
class DraftModel(nnx.Module):
    """Tokens drawn one by one from a model that has the target's vocabulary, by the target's own sampling."""

    model: Transformer = nnx.data()
    length: int = nnx.static(default=4, kw_only=True)

    def __post_init__(self):
        if self.length < 1:
            raise InputError(f"length={self.length}: must be at least 1 token")

    def prepare(self, rows: Sequence[Sequence[int]], slots: int) -> Cache:
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

    def propose(self, own: Cache, known: Known, state: State, keys: Key[Array, "B"]) -> tuple[Draft, Cache]:
        """Return `length` tokens, and their laws where they are drawn."""
        sampling, rows = state.sampling, jnp.arange(len(known.tokens))
        active = (~state.done).astype(jnp.int32)

        def draw(logits, seen, i):
            logits = sampling.adjust(logits, seen)
            if sampling.temperature is None:
                token, law = jnp.argmax(logits, axis=1).astype(jnp.int32), None
            else:
                law = jax.nn.softmax(logits, axis=1)
                own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
                token = jax.vmap(jax.random.categorical)(own_keys, logits).astype(jnp.int32)
            return token, law, None if seen is None else seen.at[rows, token].set(True)

        # All that was drafted may have been kept: then the last of it was never fed.
        missing = known.length - own.length
        at = own.length[:, None] + jnp.arange(2)
        newest = jnp.take_along_axis(known.tokens, jnp.minimum(at, known.tokens.shape[1] - 1), axis=1)
        hidden, cache = self.model(newest, own, missing * active)
        hidden = jnp.take_along_axis(hidden, jnp.clip(missing - 1, 0, 1)[:, None, None], axis=1)
        token, law, seen = draw(self.model.logits(hidden)[:, 0], state.seen, jnp.int32(0))

        def more(carry, i):
            token, seen, cache = carry
            hidden, cache = self.model(token[:, None], cache, active)
            token, law, seen = draw(self.model.logits(hidden)[:, 0], seen, i)
            return (token, seen, cache), (token, law)

        (_, _, cache), (tokens, laws) = jax.lax.scan(more, (token, seen, cache), jnp.arange(1, self.length))
        tokens, laws = (
            None if rest is None else jnp.concatenate([first[None], rest]).swapaxes(0, 1)
            for first, rest in ((token, tokens), (law, laws))
        )
        return Draft(tokens, jnp.full(len(tokens), self.length), laws), cache

    def settle(self, own: Cache, length: Int[Array, "B"]) -> Cache:
        """Forget what was not kept. The newest token was never fed."""
        return own.rewind(length - 1)
