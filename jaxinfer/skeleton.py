"""Skeleton-of-Thought: the points of an answer first, and then all of them written out at once (2307.15337).

The points are branches on a shared prefix: the conversation up to the request for one of them. Each is written without
sight of the others, so this suits answers whose points stand alone, and not those that build on one another.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence

from jaxinfer.decode.rows import common_prefix
from jaxinfer.decode.sampling import Sampling
from jaxinfer.generation import decode_text, stream_steps, tokenizer_of
from jaxinfer.program import Program
from jaxinfer.session import Session

MOST = 10  # points
_FEWEST = 2  # points; one is no skeleton
_TOKENS = 200  # that a skeleton may take
_REQUEST = 64  # tokens: more than it takes to ask for a point
_OUTLINE = (
    "Plan an answer to the question below. Write only its outline: a numbered list of 3 to 8 points, each of 3 to 6 "
    "words and on a line of its own, with no explanation.\n\nQuestion: {question}"
)
_EXPAND = "Tell me more about point {number}, and only about it, in one to three sentences."
_POINT = re.compile(r"^\s*(\d{1,2})[.)]\s+(\S.*?)\s*$")


@dataclasses.dataclass(frozen=True)
class Outline:
    """The points of an answer, and the tokens that lead to each: `prefix`, which they share, and a suffix a point."""

    points: tuple[str, ...]
    prefix: list[int]
    suffixes: list[list[int]]

    @property
    def stops(self) -> list[str]:
        """Strings at which a point ends, because another one begins."""
        return [f"\n{number}{mark}" for number in range(1, len(self.points) + 2) for mark in ".)"]


def find_points(text: str) -> tuple[str, ...]:
    """Return the points of a numbered list: the lines that begin with 1, 2, 3 and so on, until one repeats another."""
    points: list[str] = []
    for line in text.splitlines():
        found = _POINT.match(line)
        if found is None or int(found[1]) != len(points) + 1:
            continue
        point = found[2].strip("*_ ").rstrip(":.").strip("*_ ")
        if not point or point in points or len(points) == MOST:
            break
        points.append(point)
    return tuple(points)


def outline(
    session: Session,
    question: str,
    *,
    sampling: Sampling | None = None,
    seed: int = 0,
    tokens: int = _TOKENS,
    room: int = 128,
) -> tuple[Outline | None, str]:
    """Return the points that the model plans its answer to a question in, None where it plans none, and what it wrote.

    The session, of one row, then holds what the points have in common, if there is room for `room` tokens more.

    Raises:
        InputError: the program has no tokenizer or chat template, or the question leaves no room in the context.
    """
    program, asked = session.program, [{"role": "user", "content": _OUTLINE.format(question=question)}]
    prompt, text = _encode(program, asked, "1."), "1."
    session.feed([prompt], room=tokens + _REQUEST + room)
    stop = [f"\n{MOST + 1}."]
    for (piece,) in decode_text(session, tokens, sampling=sampling, seed=seed, stop=stop, steps=lambda _: 16):
        text += piece
    if len(session.rows[0]) - len(prompt) >= tokens - 1:
        text = text.rpartition("\n")[0]  # cut off in the middle of a point
    points = find_points(text)
    if len(points) < _FEWEST:
        return None, text
    plan = "\n".join(f"{i}. {point}" for i, point in enumerate(points, 1))
    rows = []
    for number, point in enumerate(points, 1):
        request = {"role": "user", "content": _EXPAND.format(number=number)}
        rows.append(_encode(program, [*asked, {"role": "assistant", "content": plan}, request], f"{number}. {point}:"))
    shared = min(common_prefix(rows[0], row) for row in rows[1:])
    session.feed([rows[0][:shared]], room=max(map(len, rows)) - shared + room)
    return Outline(points, rows[0][:shared], [row[shared:] for row in rows]), text


def write(
    branches: Session,
    plan: Outline,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
) -> Iterator[list[str]]:
    """Yield the new text of points, in pieces, from a session that holds the tokens that lead to them.

    For all of them at once it is `session.fork(plan.suffixes, room)`; for point i alone, a session that was fed
    `plan.prefix + plan.suffixes[i]`. A point ends where the model begins another one.
    """
    options = dict(sampling=sampling, seed=seed, stop=[*plan.stops, *stop])
    return decode_text(branches, max_new_tokens, steps=stream_steps, **options)


def _encode(program: Program, messages: Sequence[dict[str, str]], begun: str) -> list[int]:
    """Return the tokens of a conversation whose answer has `begun` so."""
    tokenizer = tokenizer_of(program)
    return tokenizer.encode(tokenizer.apply_chat(messages) + begun, add_special=False)
