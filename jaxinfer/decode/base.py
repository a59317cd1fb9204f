"""The decoder protocol, the state that it steps, and the plain one-token-a-step decoder."""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

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
    own: Any = nnx.data(default=None)  # what the decoder's `prepare` gave, as its steps have changed it

    def emit(self, token: Int[Array, "B"]) -> "State":
        """Return the state with one more token in every row that is not done."""
        return self.emit_some(token[:, None], jnp.ones_like(token))

    def emit_some(self, new: Int[Array, "B n"], count: Int[Array, "B"]) -> "State":
        """Return the state with the first count[b] >= 1 new tokens of rows that are not done, up to a stop or limit."""
        rows, index = jnp.arange(len(new))[:, None], jnp.arange(new.shape[1])
        taken = ~self.done[:, None] & (index < jnp.minimum(count, self.limit - self.emitted)[:, None])
        stop = taken & (new[:, :, None] == self.stop_ids).any(axis=2)
        taken &= jnp.cumsum(stop, axis=1) - stop == 0  # a stop token is taken, and none after it
        number = taken.sum(axis=1, dtype=jnp.int32)
        newest = jnp.take_along_axis(new, jnp.maximum(number - 1, 0)[:, None], axis=1)[:, 0]
        slots = jnp.where(taken, self.emitted[:, None] + index, self.tokens.shape[1])  # out of range: dropped
        emitted = self.emitted + number
        return self.replace(
            last=jnp.where(number > 0, newest, self.last),
            tokens=self.tokens.at[rows, slots].set(new, mode="drop"),
            emitted=emitted,
            done=self.done | stop.any(axis=1) | (emitted >= self.limit),
            seen=None
            if self.seen is None
            else self.seen.at[rows, jnp.where(taken, new, self.seen.shape[1])].set(True, mode="drop"),
        )

    def replace(self, **changes) -> "State":
        """Return a state with some fields changed."""
        return State(**{**{name: getattr(self, name) for name in State.__annotations__}, **changes})


@runtime_checkable
class Decoder(Protocol):
    """A strategy that turns a prefilled cache into tokens."""

    @property
    def lookahead(self) -> int:
        """How many tokens beyond those that a row keeps a step may feed, and rewind."""

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> Any:
        """Return what the state starts with as `own`, for prompts that a cache of `slots` slots holds; on the host."""

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

    lookahead: ClassVar[int] = 0

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> None:
        """Nothing: a step reads the cache and the last token alone."""

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
