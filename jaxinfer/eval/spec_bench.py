"""Speculation, measured: a question is answered plainly and with drafts in turns, and the gain is explained by costs.

What speculation gains is tokens a step; what it costs is a pass over several tokens in place of one, and the draft.
All three are measured, so that a gain which stays away can be told from one that the hardware does not have.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.sampling import Sampling
from jaxinfer.decode.speculative import Speculative
from jaxinfer.errors import InputError
from jaxinfer.program import Program

_ANY = np.int32(1 << 30)
_PASSES = 4  # of which a cost is the mean


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer. Times are in seconds; greedy, up to a stop token or the limit."""

    tokens: list[int]
    prefill: float
    decode: float  # from the first new token to the last
    steps: int
    checks: int  # steps that checked a draft
    one: float = 0.0  # a pass over one token, at the answer's end
    check: float = 0.0  # a pass over one token and a whole draft
    draft: float = 0.0  # a draft alone

    @property
    def decoded(self) -> int:
        """Tokens in `decode`: all but the first."""
        return len(self.tokens) - 1

    @property
    def predicted(self) -> float:
        """Seconds that `decode` should take, by the costs of its parts."""
        return self.checks * self.check + (self.steps - self.checks) * self.one + self.steps * self.draft


def answer(programs: Mapping[str, Program], prompt: Sequence[int], new_tokens: int, turn: int = 0) -> dict[str, Answer]:
    """Return each program's answer. They run one after the other, in the opposite order where `turn` is odd.

    Raises:
        InputError: an empty prompt, or one whose answer does not fit a program's context.
    """
    found = {}
    for name in list(programs)[:: -1 if turn % 2 else 1]:
        program = programs[name]
        limit = program.config.max_context
        if not 1 <= len(prompt) <= limit - new_tokens:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {new_tokens} after it: the prompt must be 1 token or more and "
                f"both fit the model's context of {limit}"
            )
        _warm(program, prompt, new_tokens)
        found[name] = _answer(program, prompt, new_tokens)
    return {name: found[name] for name in programs}


def summary(answers: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    """Return what answers to the same questions say of a drafter: tokens a step, shares, and speed over plain."""
    decode, predicted = (sum(getattr(a, key) for a in answers) for key in ("decode", "predicted"))
    steps, base = sum(a.steps for a in answers), sum(p.decode for p in plain)
    ratios = [p.decode / a.decode for a, p in zip(answers, plain, strict=True) if p.decoded]
    return {
        "questions": len(answers),
        "tokens_per_step": sum(a.decoded for a in answers) / max(steps, 1),
        "checked_share": sum(a.checks for a in answers) / max(steps, 1),
        "draft_share": sum(a.steps * a.draft for a in answers) / predicted if predicted else 0.0,
        "check_cost": float(np.median([a.check / a.one for a in answers])),  # in passes over one token
        "speedup": base / decode,
        "speedup_p10": float(np.percentile(ratios, 10)),
        "speedup_p90": float(np.percentile(ratios, 90)),
        # Plain decoding's predicted time over ours: both by costs measured at the same place.
        "predicted": sum(a.one * p.decoded for a, p in zip(answers, plain, strict=True)) / predicted,
        "whole": sum(p.prefill + p.decode for p in plain) / sum(a.prefill + a.decode for a in answers),
        "same": sum(a.tokens == p.tokens for a, p in zip(answers, plain, strict=True)),
    }


@functools.cache
def _shapes() -> set:
    return set()


def _warm(program: Program, prompt: Sequence[int], new_tokens: int) -> None:
    """Answer once where a shape is new, so that no compilation is timed."""
    padded = tuple(part.shape[1] for _, part, _ in loop.chunks([list(prompt)]))
    shape = (id(program.model), id(program.decoder), padded, loop.slots_for(len(prompt) + new_tokens), new_tokens)
    if shape not in _shapes():
        _answer(program, prompt, new_tokens)
        _shapes().add(shape)


def _answer(program: Program, prompt: Sequence[int], new_tokens: int) -> Answer:
    rows, decoder = [list(prompt)], program.decoder
    slots = loop.slots_for(len(prompt) + new_tokens)
    begin = time.perf_counter()
    cache = loop.empty_cache(program.model, 1, slots)
    cache, logits = loop.prefill(program.model, cache, rows)
    own = decoder.prepare(program.model, rows, slots)
    jax.block_until_ready((logits, own))
    filled = time.perf_counter()
    state = loop.start(
        decoder,
        cache,
        logits,
        limit=np.array([new_tokens]),
        stop_ids=program.stop_ids,
        sampling=Sampling(),
        seeds=np.array([0]),
        seen=None,
        own=own,
    )
    jax.block_until_ready(state)
    started = time.perf_counter()
    state = loop.advance(decoder, program.model, state, _ANY)
    jax.block_until_ready(state)
    done = time.perf_counter()
    tokens = np.asarray(state.tokens)[0, : int(state.emitted[0])].tolist()
    times = {"tokens": tokens, "prefill": filled - begin, "decode": done - started}
    if not isinstance(decoder, Speculative):
        return Answer(**times, steps=len(tokens) - 1, checks=0)
    steps, checks = int(state.own.steps[0]), int(state.own.checks)
    # The costs are those at the answer's end, a little above the mean of its steps.
    draft, state = _timed(lambda s: _drafts(decoder, s), state)
    cache = state.cache.rewind(state.cache.length - decoder.lookahead)  # room for a whole draft
    one, cache = _timed(lambda c: _passes(program.model, c, 1), cache)
    check, _ = _timed(lambda c: _passes(program.model, c, 1 + decoder.lookahead), cache)
    return Answer(**times, steps=steps, checks=checks, one=one, check=check, draft=draft)


def _timed(run, donated) -> tuple[float, Any]:
    """Return seconds a repeat, the better of two after one that may compile, and what the last one gave."""
    best = np.inf
    for i in range(3):
        begin = time.perf_counter()
        donated = jax.block_until_ready(run(donated))
        if i:
            best = min(best, time.perf_counter() - begin)
    return best / _PASSES, donated


@functools.partial(jax.jit, static_argnames=("width",), donate_argnames=("cache",))
def _passes(model, cache, width: int):
    """Feed `width` tokens and forget them, again and again; a pass takes the tokens that the last one liked."""
    start = cache.length

    def one(_, carry):
        cache, tokens = carry
        hidden, cache = model(tokens, cache, jnp.full((len(tokens),), width, jnp.int32))
        return cache.rewind(start), jnp.argmax(model.logits(hidden), axis=2).astype(jnp.int32)

    return jax.lax.fori_loop(0, _PASSES, one, (cache, jnp.zeros((len(start), width), jnp.int32)))[0]


@functools.partial(jax.jit, donate_argnames=("state",))
def _drafts(decoder: Speculative, state):
    """Draft, again and again, after texts of two lengths: one draft for all of them would not be the same work."""
    known = state.own.known
    keys = state.rng

    def one(i, carry):
        own, last = carry
        length = known.length - i % 2
        own = decoder.drafter.settle(own, length)
        now = state.replace(last=last, done=jnp.zeros_like(state.done))
        draft, own = decoder.drafter.propose(own, known._replace(length=length), now, keys)
        return decoder.drafter.settle(own, length), draft.tokens[:, 0]

    own, last = jax.lax.fori_loop(0, _PASSES, one, (state.own.drafter, state.last))
    return state.replace(last=last, own=state.own.replace(drafter=own))
