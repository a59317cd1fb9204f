"""Speculative decoding: a drafter proposes tokens, one pass of the target checks them all, what stands is emitted.

What comes out is what the target alone would give: with greedy decoding the same tokens, and with sampling, by any
temperature and filter, tokens of the same law (2211.17192, 2302.01318). Rows advance by their own counts, and nothing
leaves the device in between.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxinfer.decode import verification
from jaxinfer.decode.base import State
from jaxinfer.models.transformer import Transformer

Verifier = Literal["rejection", "block"]


class Known(NamedTuple):
    """The tokens of each row, prompt and output, of which the newest is not in the target's cache yet."""

    tokens: Int[Array, "B C"]
    length: Int[Array, "B"]


class Draft(NamedTuple):
    """Tokens that may follow: the first count[b] of row b's, and what each was drawn from, or None if by no chance."""

    tokens: Int[Array, "B g"]
    count: Int[Array, "B"]
    laws: Float[Array, "B g V"] | None


@runtime_checkable
class Drafter(Protocol):
    """What proposes tokens. It has a state of its own, a tree of arrays, and sees the target's."""

    @property
    def length(self) -> int:
        """How many tokens it proposes at most."""

    def prepare(self, rows: Sequence[Sequence[int]], slots: int) -> Any:
        """Return its state for prompts that a cache of `slots` slots holds; on the host."""

    def propose(self, own: Any, known: Known, state: State, keys: Key[Array, "B"]) -> tuple[Draft, Any]:
        """Return a draft and its state."""

    def settle(self, own: Any, length: Int[Array, "B"]) -> Any:
        """Return its state when the first length[b] tokens of row b stand, and none of those drafted beyond."""


@nnx.dataclass
class Speculation(nnx.Module):
    """What speculation keeps between its steps."""

    known: Known = nnx.data()
    drafter: Any = nnx.data()
    steps: Int[Array, "B"] = nnx.data()  # that each row has taken part in
    checks: Int[Array, ""] = nnx.data()  # steps in which some row had a draft

    def replace(self, **changes) -> "Speculation":
        """Return one with some fields changed."""
        return Speculation(**{**{name: getattr(self, name) for name in Speculation.__annotations__}, **changes})


@nnx.dataclass
class Speculative(nnx.Module):
    """One pass of the target for the tokens of a chain that a drafter proposes."""

    drafter: nnx.Module = nnx.data()
    verifier: Verifier = nnx.static(default="block", kw_only=True)  # of sampled tokens

    @property
    def lookahead(self) -> int:
        """As many tokens as are drafted."""
        return self.drafter.length

    def prepare(self, rows: Sequence[Sequence[int]], slots: int) -> Speculation:
        """Return the prompts, and the drafter's state for them."""
        tokens = np.zeros((len(rows), slots), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        length = jnp.asarray([len(row) for row in rows], jnp.int32)
        known = Known(jnp.asarray(tokens), length)
        return Speculation(known, self.drafter.prepare(rows, slots), jnp.zeros_like(length), jnp.int32(0))

    def init(self, logits: Float[Array, "B V"], state: State) -> State:
        """Emit the first token."""
        token = state.sampling.draw(logits, state.seen, state.rng, state.emitted)
        return _emit(state, token[:, None], jnp.ones_like(token))

    def step(self, model: Transformer, state: State) -> State:
        """Draft, check, emit what stands and one token more, and forget the rest."""
        own = state.own
        keys = jax.vmap(jax.random.fold_in)(state.rng, state.emitted)
        draft, drafter = self.drafter.propose(own.drafter, own.known, state, _fold(keys, 1))
        # A row never feeds more than it may emit: its cache has no room for it.
        count = jnp.where(state.done, 0, jnp.minimum(draft.count, state.limit - state.emitted - 1))

        def check(draft: Draft) -> State:
            fed = jnp.concatenate([state.last[:, None], draft.tokens], axis=1)
            start = state.cache.length
            hidden, cache = model(fed, state.cache, jnp.where(state.done, 0, count + 1))
            last, following = self._judge(model.logits(hidden), fed, count, draft.laws, state, keys)
            new = jnp.concatenate([draft.tokens, following[:, None]], axis=1)
            new = jnp.where(jnp.arange(new.shape[1]) == last[:, None], following[:, None], new)
            out = _emit(state.replace(cache=cache), new, last + 1)
            return out.replace(cache=cache.rewind(start + out.emitted - state.emitted))

        if draft.laws is None:  # there may be none at all, and a pass over more tokens costs more
            nothing = Draft(draft.tokens[:, :0], draft.count, None)
            out = jax.lax.cond((count > 0).any(), lambda: check(draft), lambda: check(nothing))
        else:
            out = check(draft)
        spec = out.own
        drafter = self.drafter.settle(drafter, spec.known.length)
        checks = spec.checks + (count > 0).any()
        return out.replace(own=spec.replace(drafter=drafter, steps=spec.steps + ~state.done, checks=checks))

    def _judge(self, logits, fed, count, laws, state, keys) -> tuple[Array, Array]:
        """Return how many drafted tokens stand, and the token after them."""
        nodes = fed.shape[1]
        seen, adjusted = state.seen, []
        for node in range(nodes):  # a penalty on what was seen depends on the drafts before
            if seen is not None and node:
                seen = seen.at[jnp.arange(len(fed)), fed[:, node]].set(True)
            adjusted.append(state.sampling.adjust(logits[:, node], seen))
        there = jnp.arange(nodes) <= count[:, None]
        if state.sampling.temperature is None:
            best = jnp.argmax(jnp.stack(adjusted, axis=1), axis=2).astype(jnp.int32)
            return verification.greedy(best, jnp.where(there, fed, -1), verification.chain(nodes - 1))
        p = jax.nn.softmax(jnp.stack(adjusted, axis=1), axis=2)
        # Nothing is drawn after the last node.
        q = None if laws is None else jnp.concatenate([laws, jnp.zeros_like(p[:, :1])], axis=1)
        if self.verifier == "block":
            law = verification.block(p, q, fed, count)
        else:
            law = verification.rejection(p, q, fed, verification.chain(nodes - 1), count=count)
        return law.draw(_fold(keys, 0))


def _fold(keys: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _emit(state: State, new: Int[Array, "B n"], count: Int[Array, "B"]) -> State:
    """Emit, and know the tokens that were."""
    out = state.emit_some(new, count)
    known, index = state.own.known, jnp.arange(new.shape[1])
    number = out.emitted - state.emitted
    C = known.tokens.shape[1]
    slots = jnp.where(index < number[:, None], known.length[:, None] + index, C)
    tokens = known.tokens.at[jnp.arange(len(new))[:, None], slots].set(new, mode="drop")
    known = Known(tokens, known.length + number)
    return out.replace(own=state.own.replace(known=known))
