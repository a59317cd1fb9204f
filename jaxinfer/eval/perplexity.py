"""Perplexity of a text under a program."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Int

from jaxinfer.errors import InputError
from jaxinfer.eval.journal import Journal
from jaxinfer.eval.scoring import score_items
from jaxinfer.generation import tokenizer_of
from jaxinfer.program import Program

Tokens = Sequence[int] | Int[np.ndarray, "n"] | Int[Array, "n"]


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """exp(nats), where nats is the mean negative log-probability of the scored tokens."""

    value: float
    stderr: float  # of value, from the spread between windows
    nats: float
    tokens_scored: int
    windows: int
    tokens_computed: int  # that went through the model now; the rest was in the journal


def perplexity(
    program: Program, text_or_tokens: str | Tokens, window: int = 512, batch_size: int = 8, progress: bool = False
) -> float:
    """Return the perplexity of a text, or of token ids: `exp(mean nats a token)`. See `score_text` for the rule."""
    return score_text(program, text_or_tokens, window, batch_size, progress).value


def score_text(
    program: Program,
    text_or_tokens: str | Tokens,
    window: int = 512,
    batch_size: int = 8,
    progress: bool = False,
    journal: Journal | None = None,
) -> Perplexity:
    """Cut the tokens into consecutive windows of `window` and score each alone.

    The first token of every window is context only; all its others are scored given what precedes them in the window.
    A text gets the special tokens that the model expects around one, once, not in every window.

    Raises:
        InputError: fewer than two tokens, or a window that the model can't take.
    """
    if not 2 <= window <= program.config.max_context:
        raise InputError(f"window={window}: must be in 2..{program.config.max_context}, which is the model's context")
    if isinstance(text_or_tokens, str):
        tokens = tokenizer_of(program).encode(text_or_tokens)
    else:
        tokens = [int(t) for t in text_or_tokens]
    if len(tokens) < 2:
        raise InputError(f"a text of {len(tokens)} tokens: perplexity needs 2 or more, the first is only context")
    windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
    windows = [w for w in windows if len(w) > 1]  # a single last token has nothing to be scored from
    records, computed = score_items(
        program,
        [[(w[:1], w[1:])] for w in windows],
        lambda i, scores: {"nats": -scores[0].logprob, "tokens": len(windows[i]) - 1},
        batch_size=batch_size,
        progress=progress,
        journal=journal,
    )
    nats, counts = (np.array([record[key] for record in records], np.float64) for key in ("nats", "tokens"))
    mean = float(nats.sum() / counts.sum())
    n = len(windows)
    # Standard error of a ratio of sums: windows are the independent draws, tokens in a window are not.
    spread = ((nats - mean * counts) ** 2).sum() * n / (n - 1) if n > 1 else math.nan
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, value * math.sqrt(spread) / float(counts.sum()), mean, int(counts.sum()), n, computed)
