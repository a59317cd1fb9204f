"""Text and tokens out of a program: the functions that people call."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.decode.loop import empty_cache
from jaxinfer.decode.rows import check_ids
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.program import Program
from jaxinfer.session import Session


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: row b's new tokens are `tokens[b, :lengths[b]]`, its stop token included."""

    tokens: Int[np.ndarray, "B M"]  # zeros after a row's length
    lengths: Int[np.ndarray, "B"]
    stopped: list[bool]  # True where a stop token ended the row, False where it ran out of room


def generate(
    program: Program,
    tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"] | Sequence[Sequence[int]],
    lengths: Sequence[int] | Int[Array, "B"] | Int[np.ndarray, "B"] | None = None,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop_ids: Sequence[int] | None = None,
) -> Generation:
    """Continue each row of `tokens`; row b is its first `lengths[b]` entries (default: all of them).

    Greedy at temperature 0. Row b draws with seed `seed + b`, or `seed[b]`, and gives the same tokens alone or in any
    batch. `stop_ids` replaces the program's own; `()` never stops early.

    Raises:
        InputError: an empty prompt, one of text, one that leaves no room in the context, or an option out of its range.
    """
    if isinstance(tokens, str) or (not hasattr(tokens, "ndim") and any(isinstance(row, str) for row in tokens)):
        raise InputError("generate takes token ids, not text: call generate_text, or encode with program.tokenizer")
    rows = [list(map(int, row)) for row in np.asarray(tokens)] if hasattr(tokens, "ndim") else [list(t) for t in tokens]
    if lengths is not None:
        rows = [row[: int(n)] for row, n in zip(rows, lengths, strict=True)]
    _check_prompts(rows, max_new_tokens)
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    session = Session(program, len(rows))
    session.feed(rows, room=max_new_tokens)
    out: list[list[int]] = [[] for _ in rows]
    for new in session.decode(max_new_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids):
        for row, more in zip(out, new, strict=True):
            row.extend(more)
    counts = np.array([len(row) for row in out])
    padded = np.zeros((len(rows), max(int(counts.max()), 1)), np.int32)
    for b, row in enumerate(out):
        padded[b, : len(row)] = row
    stops = set(program.stop_ids if stop_ids is None else stop_ids)
    return Generation(padded, counts, [bool(row) and row[-1] in stops for row in out])


def stream_text(
    program: Program,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces as they become final; together they are `generate_text`'s answer."""
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    session, rows = Session(program), encode(program, [prompt])
    _check_prompts(rows, max_new_tokens)
    session.feed(rows, room=max_new_tokens)
    for pieces in decode_text(session, max_new_tokens, sampling=sampling, seed=seed, stop=stop, steps=stream_steps):
        if pieces[0]:
            yield pieces[0]


def generate_text(
    program: Program,
    prompts: str | Sequence[str],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int | Sequence[int] = 0,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """Return the continuation of one prompt as a string, or of several, as one ragged batch, as a list.

    The text ends before the first of the `stop` strings or the checkpoint's stop tokens. See `generate` for the rest.
    """
    alone = isinstance(prompts, str)
    rows = encode(program, [prompts] if alone else list(prompts))
    _check_prompts(rows, max_new_tokens)
    sampling = Sampling.of(temperature, top_k, top_p, min_p, repetition_penalty)
    session = Session(program, len(rows))
    session.feed(rows, room=max_new_tokens)
    steps = (lambda _: 16) if stop else (lambda _: 1 << 30)
    out = [""] * len(rows)
    for pieces in decode_text(session, max_new_tokens, sampling=sampling, seed=seed, stop=stop, steps=steps):
        out = [text + piece for text, piece in zip(out, pieces, strict=True)]
    return out[0] if alone else out


def stream_steps(dispatch: int) -> int:
    """Return how many tokens to decode before the next look: one at first, so that it shows at once, then more."""
    return min(1 << dispatch, 8)


def decode_text(session: Session, max_new_tokens, *, sampling, seed, stop: Sequence[str], steps) -> Iterator[list[str]]:
    """Run `session.decode` and yield each row's new final text, cut before the first stop string."""
    if isinstance(stop, str) or not all(stop):
        raise InputError(f"stop={stop!r}: must be a list of non-empty strings")
    tokenizer = tokenizer_of(session.program)
    streams = [tokenizer.stream() for _ in session.rows]
    cutters = [_StopCutter(stop) for _ in session.rows]
    for new in session.decode(max_new_tokens, sampling=sampling, seed=seed, steps=steps):
        pieces = [cut.push(stream.push(ids)) for cut, stream, ids in zip(cutters, streams, new, strict=True)]
        session.end([b for b, cut in enumerate(cutters) if cut.stopped])
        yield pieces
    yield [cut.push(stream.flush()) + cut.flush() for cut, stream in zip(cutters, streams, strict=True)]


class _StopCutter:
    """Passes text on until a stop string, and holds back an end that could be the beginning of one."""

    def __init__(self, stop: Sequence[str]):
        self.stopped = False
        self._stop = list(stop)
        self._held = ""

    def push(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        longest = max((len(s) for s in self._stop), default=1) - 1
        hold = next((n for n in range(min(longest, len(self._held)), 0, -1) if self._may_begin(self._held[-n:])), 0)
        ready, self._held = self._held[: len(self._held) - hold], self._held[len(self._held) - hold :]
        return ready

    def flush(self) -> str:
        return "" if self.stopped else self._held

    def _may_begin(self, end: str) -> bool:
        return any(s.startswith(end) for s in self._stop)


@jax.jit
def _all_logits(model, tokens, cache):
    return model.logits(model(tokens, cache)[0])


def logits(program: Program, tokens: Int[Array, "B T"] | Int[np.ndarray, "B T"]) -> Float[Array, "B T V"]:
    """Return the float32 next-token logits after every token of equally long rows.

    Raises:
        InputError: a token id outside the vocabulary, or more tokens than the model's context.
    """
    tokens = np.asarray(tokens, np.int32)
    check_ids(tokens.ravel(), program.config.vocab_size)
    if tokens.shape[1] > program.config.max_context:
        raise InputError(f"{tokens.shape[1]} tokens a row: the model's context is {program.config.max_context}")
    cache = empty_cache(program.model, *tokens.shape)
    return _all_logits(program.model, tokens, cache)


def tokenizer_of(program: Program):
    """Return the program's tokenizer.

    Raises:
        InputError: it has none.
    """
    if program.tokenizer is None:
        raise InputError(f"program {program.name!r} has no tokenizer: use ji.generate with token ids")
    return program.tokenizer


def encode(program: Program, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt, with the special tokens that the model expects around a text."""
    return [tokenizer_of(program).encode(p) for p in prompts]


def _check_prompts(rows: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens}: must be 1 or more")
    if not rows:
        raise InputError("no prompts: give at least one")
    for i, row in enumerate(rows):
        if not len(row):
            which = f"prompt {i}" if len(rows) > 1 else "the prompt"
            raise InputError(f"{which} is empty: a model without a beginning token needs at least one token of text")
