"""Answers written point by point, all points at once: the printing and the clocks of `jaxinfer generate --skeleton`."""

import sys
import time

import numpy as np

from jaxinfer import skeleton
from jaxinfer.cli.options import Generating
from jaxinfer.cli.timing import Tally, compile_seconds
from jaxinfer.decode.sampling import Sampling
from jaxinfer.program import Program

_ROUNDS = 3  # of either way, after one of each that compiles


def answer(program: Program, question: str, generating: Generating, sampling: Sampling, time_saved: bool) -> bool:
    """Stream an answer in points to stdout and what it took to stderr; return False where the model plans none."""
    session, clock = Tally(program), _Clock()
    options = dict(sampling=sampling, seed=generating.seed)
    plan, _ = skeleton.outline(session, question, room=generating.max_new_tokens, **options)
    planning, planned = clock.seconds(), session.tokens[0]
    if plan is None:
        return False
    count = len(plan.points)
    _note(f"outline of {count} points: {planned} tokens in {planning:.2f} s; now all of them at once")
    texts, seconds, branches = _together(session, plan, generating, sampling, _InOrder(plan.points))
    tokens = sum(branches.tokens)
    _note(f"{count} points at once: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tok/s")
    if time_saved:
        session.join(branches, plan.prefix)
        _note(_saved(session, plan, texts, planning, generating, sampling))
    return True


class _Clock:
    """The time since it was made, without what was spent on compiling."""

    def __init__(self):
        self._begin, self._compiled = time.perf_counter(), compile_seconds()

    def seconds(self) -> float:
        passed = time.perf_counter() - self._begin
        return max(passed - (compile_seconds() - self._compiled), 1e-9)


class _InOrder:
    """Prints points that are written all at once: each as it comes, once those before it are complete."""

    def __init__(self, points: tuple[str, ...]):
        self._heads = [f"{i}. {point}:" for i, point in enumerate(points, 1)]
        self._held = [""] * len(points)
        self._at, self._begun = 0, False

    def push(self, pieces: list[str], complete: list[bool]) -> None:
        self._held = [held + piece for held, piece in zip(self._held, pieces, strict=True)]
        while self._at < len(self._held):
            self._print(self._held[self._at], complete[self._at])
            if not complete[self._at]:
                break
            self._at, self._begun = self._at + 1, False
        sys.stdout.flush()

    def _print(self, text: str, complete: bool) -> None:
        """Print what is new of the point at hand, but for space that may turn out to be its end."""
        if not self._begun:
            text = text.lstrip()
            if text or complete:
                sys.stdout.write(self._heads[self._at] + (" " if text else ""))
                self._begun = True
        out = text.rstrip()
        self._held[self._at] = text[len(out) :]
        sys.stdout.write(out + ("\n" if complete else ""))


def _together(session: Tally, plan, generating: Generating, sampling, out: _InOrder | None):
    """Return every point's text, the seconds that it took to write all of them at once, and the branches."""
    clock, most = _Clock(), generating.max_new_tokens
    branches = session.fork(plan.suffixes, room=most)
    texts = [""] * len(plan.points)
    options = dict(sampling=sampling, seed=generating.seed, stop=generating.stop)
    for pieces in skeleton.write(branches, plan, most, **options):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        seconds = clock.seconds()
        if out is not None:
            out.push(pieces, [ended or n >= most for ended, n in zip(branches.ended, branches.tokens, strict=True)])
    if out is not None:
        out.push([""] * len(texts), [True] * len(texts))
    return texts, seconds, branches


def _in_turn(session: Tally, plan, generating: Generating, sampling) -> tuple[list[str], float]:
    """Return every point's text and the seconds that it took to write one after the other."""
    texts, total = [], 0.0
    for i, suffix in enumerate(plan.suffixes):
        session.feed([plan.prefix], room=len(suffix) + generating.max_new_tokens)  # not timed: the way back
        clock, text = _Clock(), ""
        session.feed([plan.prefix + suffix])
        options = dict(sampling=sampling, seed=generating.seed + i, stop=generating.stop)
        for (piece,) in skeleton.write(session, plan, generating.max_new_tokens, **options):
            text += piece
        total += clock.seconds()
        texts.append(text)
    return texts, total


def _saved(session: Tally, plan, texts: list[str], planning: float, generating: Generating, sampling) -> str:
    """Return a line that compares both ways of writing the points, measured in turns."""
    times: dict[str, list[float]] = {"at once": [], "in turn": []}
    for _ in range(1 + _ROUNDS):
        _, seconds, branches = _together(session, plan, generating, sampling, None)
        session.join(branches, plan.prefix)
        times["at once"].append(seconds)
        alone, seconds = _in_turn(session, plan, generating, sampling)
        times["in turn"].append(seconds)
    (one, one_text), (other, other_text) = (_median(times[name][1:]) for name in ("at once", "in turn"))
    same = sum(a == b for a, b in zip(texts, alone, strict=True))
    return (
        f"{_ROUNDS} rounds in turns: at once {one_text}, one after the other {other_text}: {other / one:.2f} times as "
        f"fast, {other - one:.2f} s saved; with the outline {planning + one:.2f} s against {planning + other:.2f} s; "
        f"{same} of {len(texts)} points the same text"
    )


def _median(seconds: list[float]) -> tuple[float, str]:
    median = float(np.median(seconds))
    return median, f"{median:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
