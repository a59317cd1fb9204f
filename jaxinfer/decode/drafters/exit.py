"""The target's own first layers as the drafter, with its cache and its work shared (LayerSkip, 2404.16710).

A drafted token has run through the first layers already when it is checked: the check runs the other layers alone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.cache.base import Cache
from jaxinfer.decode.base import State
from jaxinfer.decode.draft import Begun, Draft, Known, Outcome
from jaxinfer.decode.drafters.chain import draw_chain
from jaxinfer.decode.once import once
from jaxinfer.decode.verification import chain
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer


@nnx.dataclass
class Exit(nnx.Module):
    """Tokens drawn one by one from what the target's own head makes of the output of its first `layers` layers."""

    layers: int = nnx.static(kw_only=True)
    length: int = nnx.static(default=4, kw_only=True)

    def __post_init__(self):
        if self.length < 1 or self.layers < 1:
            raise InputError(f"layers={self.layers}, length={self.length}: must be at least 1 layer and 1 token")

    @property
    def parents(self) -> tuple[int, ...]:
        """A chain."""
        return chain(self.length)

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> None:
        """Nothing: the target's cache is all that it needs.

        Raises:
            InputError: the model has no layer beyond the exit.
        """
        if self.layers >= model.config.num_layers:
            raise InputError(f"layers={self.layers}: must be below the model's {model.config.num_layers}")

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
        """Return `width` tokens, and the check of them as far as it has come."""
        B, g, V, start = len(state.last), self.length, model.config.vocab_size, state.cache.length
        active = (~state.done).astype(jnp.int32)
        zeros = jnp.zeros((B, g + 1, model.config.embed_dim), jax.eval_shape(model.embed, state.last[:, None]).dtype)

        def run(carry, token, i):
            """Run node i through the first layers."""
            hidden, cache = carry
            cache = Cache(length=start + i * active, layers=cache.layers)
            x, cache, _ = model.run_layers(model.embed(token[:, None]), cache, active, end=self.layers)
            return x, (jax.lax.dynamic_update_slice_in_dim(hidden, x, i, axis=1), cache)

        def feed(carry, token, i):
            x, carry = run(carry, token, i)
            return model.logits(model.final_norm(x))[:, 0], carry

        def draft(carry):
            logits, carry = feed(carry[2:], state.last, jnp.int32(0))
            tokens, found, carry = draw_chain(logits, feed, carry, state, keys, width, g, laws)
            last = jnp.take_along_axis(tokens, jnp.full((B, 1), width - 1), axis=1)[:, 0]
            _, (hidden, cache) = run(carry, last, width)
            return tokens, found, hidden, Cache(length=start, layers=cache.layers)

        nothing = jnp.zeros((B, g), jnp.int32), jnp.zeros((B, g, V)) if laws else None, zeros, state.cache
        tokens, found, hidden, cache = once(width > 0, draft, nothing)
        return Draft(tokens, jnp.full(B, width), found, begun=Begun(hidden, cache)), None

    def settle(self, own: None, known: Known, outcome: Outcome | None) -> None:
        """Nothing to forget: the target's cache forgets it."""
