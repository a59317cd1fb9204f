"""Speculation, measured: a question is answered plainly and with drafts in turns, and the gain is explained by costs.

What speculation gains is tokens a step; what it costs is a pass over several tokens in place of one, and the draft.
All three are measured, so that a gain which stays away can be told from one that the hardware does not have.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.costs import costs_of
from jaxinfer.decode.sampling import Sampling
from jaxinfer.decode.speculative import Speculative
from jaxinfer.errors import InputError
from jaxinfer.program import Program
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.tree import replace

TIE = 1e-3  # what float32 scores of a tie differ by, at most


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer, greedy, up to a stop token or the limit. Times are in seconds, costs in passes over one token."""

    tokens: list[int]
    prefill: float
    decode: float  # from the first new token to the last
    steps: int
    checked: list[int] = dataclasses.field(default_factory=list)  # steps by the width of their check
    check: list[float] = dataclasses.field(default_factory=list)  # what a check of each width costs
    draft: list[float] = dataclasses.field(default_factory=list)  # what the draft of a step with it costs

    @property
    def decoded(self) -> int:
        """Tokens in `decode`: all but the first."""
        return len(self.tokens) - 1

    @property
    def drafting(self) -> float:
        """What the drafts cost in all."""
        return sum(n * c for n, c in zip(self.checked, self.draft, strict=True))

    @property
    def predicted(self) -> float:
        """What the steps cost in all; a plain answer's cost one each."""
        return self.drafting + sum(n * c for n, c in zip(self.checked, self.check, strict=True)) or float(self.steps)


class Bench:
    """The programs that answer, a plain one and others with drafts, and what was compiled and measured for them."""

    def __init__(self, programs: Mapping[str, Program], new_tokens: int):
        self.programs, self.new_tokens = dict(programs), new_tokens
        self._warm: set = set()
        self._costs: dict = {}

    def answer(self, prompt: Sequence[int], turn: int = 0) -> dict[str, Answer]:
        """Return each program's answer. They run one after the other, in the opposite order where `turn` is odd.

        Raises:
            InputError: an empty prompt, or one whose answer does not fit the context.
        """
        found = {}
        for name in list(self.programs)[:: -1 if turn % 2 else 1]:
            program = self.programs[name]
            limit = program.config.max_context
            if not 1 <= len(prompt) <= limit - self.new_tokens:
                raise InputError(
                    f"a prompt of {len(prompt)} tokens and {self.new_tokens} after it: the prompt must be 1 token or "
                    f"more and both fit the model's context of {limit}"
                )
            slots = loop.slots_for(len(prompt) + self.new_tokens)
            program = self._measured(name, program, slots)
            padded = tuple(part.shape[1] for _, part, _ in loop.chunks([list(prompt)]))
            if (name, padded, slots) not in self._warm:  # so that no compilation is timed
                _answer(program, prompt, self.new_tokens, slots)
                self._warm.add((name, padded, slots))
            found[name] = _answer(program, prompt, self.new_tokens, slots)
        return {name: found[name] for name in self.programs}

    def _measured(self, name: str, program: Program, slots: int) -> Program:
        """Return a program that speculates with the costs of this run, not those of another day."""
        decoder = program.decoder
        if not isinstance(decoder, Speculative):
            return program
        if (name, slots) not in self._costs:
            self._costs[name, slots] = costs_of(program.model, decoder.drafter, decoder.widths, 1, slots, anew=True)
        return program.replace(decoder=replace(decoder, costs=self._costs[name, slots]))


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    """Return a question's ids, in the model's chat template where it has one."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(question)
    return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": question}]), add_special=False)


def summary(answers: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    """Return what answers to the same questions say of a drafter: tokens a step, shares, and speed over plain.

    Speeds are those of a token: where activations are rounded, answers part at ties, and one may end before the other.
    """
    steps, predicted, tokens = (sum(getattr(a, key) for a in answers) for key in ("steps", "predicted", "decoded"))
    pairs = [(p, a) for p, a in zip(plain, answers, strict=True) if p.decoded and a.decoded]
    ratios = [p.decode / p.decoded / (a.decode / a.decoded) for p, a in pairs] or [1.0]
    rates = [sum(x.decode for x in side) / sum(x.decoded for x in side) for side in zip(*pairs, strict=True)]
    checked = np.sum([a.checked for a in answers], axis=0)
    return {
        "questions": len(answers),
        "tokens_per_step": tokens / max(steps, 1),
        "checked_share": 1 - checked[0] / max(steps, 1),
        "draft_share": sum(a.drafting for a in answers) / max(predicted, 1e-9),
        "check_cost": answers[-1].check[-1],
        "speedup": rates[0] / rates[1] if pairs else 1.0,
        "speedup_p10": float(np.percentile(ratios, 10)),
        "speedup_p90": float(np.percentile(ratios, 90)),
        # What the parts cost says of the same steps: a plain one is one pass.
        "predicted": tokens / max(predicted, 1e-9),
        # Of answers as long as the plain ones.
        "whole": sum(p.prefill + p.decode for p, _ in pairs)
        / sum(a.prefill + a.decode * p.decoded / a.decoded for p, a in pairs)
        if pairs
        else 1.0,
        "same": sum(a.tokens == p.tokens for a, p in zip(answers, plain, strict=True)),
    }


def gap(program: Program, prompt: Sequence[int], found: Sequence[int], expected: Sequence[int]) -> float:
    """Return by how much the scores of the first two tokens that differ do; 0 where none does: a tie, or an error."""
    for i, (a, b) in enumerate(zip(found, expected, strict=False)):
        if a != b:
            cache = loop.empty_cache(program.model, 1, loop.slots_for(len(prompt) + len(expected)))
            scores = np.asarray(loop.prefill(program.model, cache, [[*prompt, *expected[:i]]])[1])[0]
            return float(abs(scores[a] - scores[b]))
    return 0.0 if len(found) == len(expected) else float("inf")


def _answer(program: Program, prompt: Sequence[int], new_tokens: int, slots: int) -> Answer:
    rows, decoder = [list(prompt)], program.decoder
    begin = time.perf_counter()
    cache = loop.empty_cache(program.model, 1, slots)
    cache, scores = loop.prefill(program.model, cache, rows)
    own = decoder.prepare(program.model, rows, slots)
    jax.block_until_ready((scores, own))
    filled = time.perf_counter()
    state = loop.start(
        decoder, cache, scores, limit=np.array([new_tokens]), stop_ids=program.stop_ids, sampling=Sampling(),
        seeds=np.array([0]), seen=None, own=own,
    )  # fmt: skip
    jax.block_until_ready(state)
    started = time.perf_counter()
    state = loop.advance(decoder, program.model, state, loop.TO_THE_END)
    jax.block_until_ready(state)
    done = time.perf_counter()
    tokens = np.asarray(state.tokens)[0, : int(state.emitted[0])].tolist()
    times = {"tokens": tokens, "prefill": filled - begin, "decode": done - started}
    if not isinstance(decoder, Speculative):
        return Answer(**times, steps=len(tokens) - 1)
    check, draft = (np.asarray(x, float).tolist() for x in decoder.costs)
    if decoder.ready:  # it drafts at every step, and then sees how much of it is checked
        draft = [draft[-1]] * len(draft)
    checked = np.asarray(state.own.checked).tolist()
    return Answer(**times, steps=int(state.own.steps[0]), checked=checked, check=check, draft=draft)
