"""Speculative decoding: a drafter proposes tokens, one pass of the target checks them all, what stands is emitted.

What comes out is what the target alone would give: with greedy decoding the same tokens, and with sampling tokens of
the same law (2211.17192, 2302.01318), by the verifier "coupled" even the same tokens for the same seed. Rows advance by
their own counts, and nothing leaves the device in between.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxinfer.decode import verification
from jaxinfer.decode.base import State
from jaxinfer.decode.costs import costs_of
from jaxinfer.decode.draft import Draft, Known, Outcome, Speculation
from jaxinfer.decode.once import once
from jaxinfer.decode.pace import HOPE, Costs, Pace, choose_width, widths_of
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.token_tree import TokenTree

Verifier = Literal["coupled", "block", "rejection", "typical"]
TYPICAL = (0.09, 0.3)  # epsilon and delta of typical acceptance, as Medusa has them


@nnx.dataclass
class Speculative(nnx.Module):
    """One pass of the target for the tokens of a tree that a drafter proposes.

    `adapt`: each step drafts as much as is worth it, by what was kept before and by `costs`, measured where None.
    """

    drafter: nnx.Module = nnx.data()
    costs: Costs | None = nnx.data(default=None, kw_only=True)
    verifier: Verifier = nnx.static(default="coupled", kw_only=True)  # of sampled tokens
    adapt: bool = nnx.static(default=False, kw_only=True)

    @property
    def nodes(self) -> int:
        """How many tokens are drafted at most."""
        return len(self.drafter.parents) - 1

    @property
    def lookahead(self) -> int:
        """As many tokens as are drafted."""
        return self.nodes

    @property
    def widths(self) -> tuple[int, ...]:
        """The draft lengths that a check may have."""
        return getattr(self.drafter, "widths", None) or (widths_of(self.nodes) if self.adapt else (0, self.nodes))

    @property
    def ready(self) -> bool:
        """Whether a draft is made before its width is chosen: one that tells how good it is costs next to nothing."""
        return hasattr(self.drafter, "hopes")

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> Speculation:
        """Return the prompts, and the drafter's state for them; may measure what this device needs for a check."""
        tokens = np.zeros((len(rows), slots), np.int32)
        for b, row in enumerate(rows):
            tokens[b, : len(row)] = row
        length = jnp.asarray([len(row) for row in rows], jnp.int32)
        drafter, pace, costs = self.drafter, None, None
        if self.adapt:
            pace = Pace.new(getattr(drafter, "hopes", (HOPE,)), 1 + self.nodes)
            # What the decoder has itself stays there: the state is donated, step after step.
            costs = None if self.costs else costs_of(model, drafter, self.widths, len(rows), slots)
        return Speculation(
            known=Known(jnp.asarray(tokens), length),
            drafter=drafter.prepare(model, rows, slots),
            steps=jnp.zeros_like(length),
            checked=jnp.zeros(len(self.widths), jnp.int32),
            pace=pace,
            costs=costs,
        )

    def init(self, logits: Float[Array, "B V"], state: State) -> State:
        """Emit the first token."""
        token = state.sampling.draw(logits, state.seen, state.rng, state.emitted)
        return _emit(state, token[:, None], jnp.ones_like(token))

    def step(self, model: Transformer, state: State) -> State:
        """Draft, check, emit what stands and one token more, and forget the rest."""
        own, drafter = state.own, self.drafter
        keys = jax.vmap(jax.random.fold_in)(state.rng, state.emitted)
        sampled = state.sampling.temperature is not None
        laws = sampled and self.verifier in ("block", "rejection")
        costs = self.costs or own.costs
        width = jnp.int32(self.nodes)
        if self.adapt and not self.ready:
            hope = own.pace.gains(drafter.parents, self.widths)[0] * (~state.done).sum()
            width = jnp.asarray(self.widths)[choose_width(hope, (~state.done).sum(), costs, drafted=False)]
        draft, drafter_own = drafter.propose(model, own.drafter, own.known, state, _fold(keys, 1), width, laws)
        # A row never feeds more than it may emit: its cache has no room for it.
        count = jnp.minimum(jnp.minimum(draft.count, width), state.limit - state.emitted - 1)
        count = jnp.where(state.done, 0, jnp.maximum(count, 0))
        chosen = self._choose(own, draft, count, state.done)
        before, hidden = state.done, None
        if draft.begun is not None:  # the drafter has run it in the target's own cache
            hidden, state = draft.begun.hidden, state.replace(cache=draft.begun.cache)
        carry = state, self._nothing(state, hidden, model)
        for index, size in enumerate(self.widths):
            check = functools.partial(self._check, model, draft, hidden, count, size, keys)
            carry = once(chosen == index, lambda c, check=check: check(c[0]), carry)
        out, outcome = carry
        spec = out.own
        if self.adapt:
            trust = jnp.zeros_like(count) if draft.trust is None else draft.trust
            learned = spec.pace.learn(drafter.parents, trust, jnp.maximum(outcome.count, 0), outcome.last)
            spec = spec.replace(pace=learned)
        spec = spec.replace(
            drafter=drafter.settle(drafter_own, spec.known, outcome),
            steps=spec.steps + ~before,
            checked=spec.checked.at[chosen].add(1),
        )
        return out.replace(own=spec)

    def _choose(self, own: Speculation, draft: Draft, count, done) -> Int[Array, ""]:
        """Return the index of the width that is checked: the smallest that holds the draft, or what is worth most."""
        widths = jnp.asarray(self.widths)
        holds = (widths < count.max()).sum()
        if not (self.adapt and self.ready):
            return holds
        gains = own.pace.gains(self.drafter.parents, self.widths)
        hope = jnp.where((count > 0)[:, None], gains[draft.trust], 0).sum(axis=0)
        return jnp.minimum(holds, choose_width(hope, (~done).sum(), self.costs or own.costs, drafted=True))

    def _nothing(self, state: State, hidden: Array | None, model: Transformer) -> Outcome:
        """Return an outcome of the right shapes."""
        zeros = jnp.zeros((len(state.last), 1 + self.nodes), jnp.int32)
        count = getattr(self.drafter, "wants", ())
        x = jax.eval_shape(model.embed, zeros)
        return Outcome(zeros, state.last, zeros, state.last, tuple(jnp.zeros(x.shape, x.dtype) for _ in count))

    def _check(self, model, draft: Draft, hidden, count, width: int, keys, state: State) -> tuple[State, Outcome]:
        """Return the state after a check of the draft's first `width` nodes, and its outcome."""
        parents = self.drafter.parents[: width + 1]
        chain = parents == verification.chain(width)
        tree = None if chain else TokenTree.of(parents)
        fed = jnp.concatenate([state.last[:, None], draft.tokens[:, :width]], axis=1)
        count, start = jnp.minimum(count, width), state.cache.length
        # Where there is a draft, what the drafter has run of the target is not run again.
        first = 0 if hidden is None or width == 0 else self.drafter.layers
        x = hidden[:, : width + 1] if first else model.embed(fed)
        fed_counts = jnp.where(state.done, 0, count + 1)
        wants = tuple(getattr(self.drafter, "wants", ()))
        x, cache, features = model.run_layers(x, state.cache, fed_counts, tree, first=first, after=wants)
        hidden, cache = model.final_norm(x), cache.longer(fed_counts)
        best, last, following = self._judge(model.logits(hidden), fed, count, parents, draft.laws, state, keys)
        path = _paths(parents)[last]  # [B, depth]: the nodes below the root that stand, in order
        new = jnp.concatenate([jnp.take_along_axis(fed, path, axis=1), jnp.zeros_like(last)[:, None]], axis=1)
        depth = jnp.asarray(TokenTree.of(parents).depth)[last]
        new = jnp.where(jnp.arange(new.shape[1]) == depth[:, None], following[:, None], new)
        out = _emit(state.replace(cache=cache), new, depth + 1)
        taken = out.emitted - state.emitted
        if chain:
            cache = cache.rewind(start + taken)
        else:
            nodes = jnp.concatenate([jnp.zeros_like(last)[:, None], path], axis=1)
            cache = cache.keep(start, nodes, taken)
        pad = ((0, 0), (0, self.nodes - width))
        outcome = Outcome(
            tokens=jnp.pad(fed, pad),
            count=jnp.where(state.done, -1, count),
            best=jnp.pad(best, pad),
            last=last,
            features=tuple(jnp.pad(x, (*pad, (0, 0))) for x in features),
        )
        return out.replace(cache=cache), outcome

    def _judge(self, logits, fed, count, parents, laws, state: State, keys) -> tuple[Array, Array, Array]:
        """Return the likeliest token after each node, the last node that stands, and the token after it."""
        sampling, seen, adjusted = state.sampling, [state.seen], []
        depth = TokenTree.of(parents).depth
        for node, parent in enumerate(parents):  # a penalty on what was seen depends on the drafts before
            if node:
                before = seen[parent]
                seen.append(None if before is None else before.at[jnp.arange(len(fed)), fed[:, node]].set(True))
            adjusted.append(sampling.adjust(logits[:, node], seen[node]))
        likely = jnp.argmax(jnp.stack(adjusted, axis=1), axis=2).astype(jnp.int32)
        there = jnp.where(jnp.arange(len(parents)) <= count[:, None], fed, -1)
        if sampling.temperature is None:
            return likely, *verification.greedy(likely, there, parents)
        if self.verifier == "coupled":  # the token that the target alone would draw at each node's place
            drawn = [sampling.pick(x, state.rng, state.emitted + d) for x, d in zip(adjusted, depth, strict=True)]
            return likely, *verification.greedy(jnp.stack(drawn, axis=1), there, parents)
        p = jax.nn.softmax(jnp.stack(adjusted, axis=1), axis=2)
        # Nothing is drawn after the last node.
        q = None if laws is None else jnp.concatenate([laws[:, : len(parents) - 1], jnp.zeros_like(p[:, :1])], axis=1)
        if self.verifier == "typical":
            law = verification.typical(p, fed, parents, *TYPICAL, count=count)
        elif self.verifier == "block" and parents == verification.chain(len(parents) - 1):
            law = verification.block(p, q, fed, count)
        else:
            law = verification.rejection(p, q, fed, parents, count=count)
        return likely, *law.draw(_fold(keys, 0))


def _fold(keys: Key[Array, "B"], number: int) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _paths(parents: tuple[int, ...]) -> Int[Array, "N depth"]:
    """Return the nodes from below the root to each node, padded with the root."""
    paths: list[list[int]] = [[]]
    for node, parent in enumerate(parents[1:], 1):
        paths.append([*paths[parent], node])
    longest = max(map(len, paths))
    return jnp.asarray([[*p, *[0] * (longest - len(p))] for p in paths], jnp.int32).reshape(len(parents), longest)


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
