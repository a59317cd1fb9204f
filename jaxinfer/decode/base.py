"""The decoder protocol, the state that it steps, and the plain one-token-a-step decoder."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from jaxinfer.cache.base import Cache
from jaxinfer.decode.sampling import Sampling
from jaxinfer.models.transformer import Transformer


@nnx.dataclass
class State(nnx.Module):
    """A batch in the middle of its generation. Rows never read each other's entries.

    `last` was emitted but is not in the cache yet: the next step feeds it.
    """

    cache: Cache = nnx.data()
    last: Int[Array, "B"] = nnx.data()
    tokens: Int[Array, "B M"] = nnx.data()  # emitted so far, left-aligned; the rest is zero
    emitted: Int[Array, "B"] = nnx.data()
    limit: Int[Array, "B"] = nnx.data()  # tokens a row may emit, at most M
    done: Bool[Array, "B"] = nnx.data()
    stop_ids: Int[Array, "n"] = nnx.data()
    sampling: Sampling = nnx.data()
    rng: Key[Array, "B"] = nnx.data()
    seen: Bool[Array, "B V"] | None = nnx.data()  # tokens of the prompt and the output; None without a penalty

    def emit(self, token: Int[Array, "B"]) -> "State":
        """Return the state with one more token in every row that is not done."""
        rows = jnp.arange(token.shape[0])
        token = jnp.where(self.done, self.last, token)
        slot = jnp.where(self.done, self.tokens.shape[1], self.emitted)  # out of range: dropped
        emitted = self.emitted + ~self.done
        stopped = (token[:, None] == self.stop_ids[None]).any(axis=1)
        return self.replace(
            last=token,
            tokens=self.tokens.at[rows, slot].set(token, mode="drop"),
            emitted=emitted,
            done=self.done | stopped | (emitted >= self.limit),
            seen=None if self.seen is None else self.seen.at[rows, token].set(True),
        )

    def replace(self, **changes) -> "State":
        """Return a state with some fields changed."""
        return State(**{**{name: getattr(self, name) for name in State.__annotations__}, **changes})


@runtime_checkable
class Decoder(Protocol):
    """A strategy that turns a prefilled cache into tokens."""

    def init(
        self,
        logits: Float[Array, "B V"],
        state: State,
    ) -> State:
        """Return the state after the first token, drawn from the prefill's logits."""

    def step(self, model: Transformer, state: State) -> State:
        """Return the state with at least one more token in every row that is not done."""


@nnx.dataclass
class Autoregressive(nnx.Module):
    """One forward pass a token."""

    def init(self, logits: Float[Array, "B V"], state: State) -> State:
        """Emit the first token."""
        return state.emit(state.sampling.draw(logits, state.seen, state.rng, state.emitted))

    def step(self, model: Transformer, state: State) -> State:
        """Feed the last token and emit the next one. Rows that are done feed nothing."""
        hidden, cache = model(state.last[:, None], state.cache, (~state.done).astype(jnp.int32))
        token = state.sampling.draw(model.logits(hidden)[:, 0], state.seen, state.rng, state.emitted)
        return state.replace(cache=cache).emit(token)


def run(decoder: Decoder, model: Transformer, state: State, steps: Int[Array, ""]) -> State:
    """Step until every row is done, at most `steps` times: the only decode loop, all of it on the device."""

    def unfinished(carry):
        i, state = carry
        return (i < steps) & ~state.done.all()

    return jax.lax.while_loop(unfinished, lambda c: (c[0] + 1, decoder.step(model, c[1])), (0, state))[1]
