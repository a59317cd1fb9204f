"""Rows of token ids, on the host."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxinfer.errors import InputError

Rows = list[list[int]]


def check_ids(row: Sequence[int] | Int[np.ndarray, "n"], vocab_size: int) -> None:
    """Raise InputError where a token id is outside the vocabulary."""
    if len(row) and not (min(row) >= 0 and max(row) < vocab_size):
        bad = max(row) if max(row) >= vocab_size else min(row)
        raise InputError(f"token {bad}: must be in 0..{vocab_size - 1}; is this the right tokenizer?")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows begin with in common."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def seen(rows: Rows, vocab_size: int) -> Bool[np.ndarray, "B V"]:
    """Return which tokens each row has."""
    found = np.zeros((len(rows), vocab_size), bool)
    for b, row in enumerate(rows):
        found[b, row] = True
    return found
