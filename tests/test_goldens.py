"""Every family against transformers: the logits and greedy tokens that scripts/make_goldens.py wrote, any way we run.

A family compiles few shapes: a call takes WIDTH tokens, of which a row's count says how many are real.
"""

import functools

import jax
import numpy as np
import pytest
from models import GOLDENS, load_model

from jaxinfer.generation import generate, logits
from jaxinfer.program import Program

CASES = sorted(folder.name for folder in GOLDENS.iterdir() if (folder / "expected.npz").exists())
# Dynamic NTK rotates a key by the length at which it was cached: only the whole prompt at once agrees with itself.
STEPPED = [case for case in CASES if case != "llama_ntk"]
BOUND = 1e-4
WIDTH = 32


@functools.cache
def golden(case: str) -> tuple:
    """Return the case's model, tokens, lengths, expected logits, and greedy continuation (None without one)."""
    expected = np.load(GOLDENS / case / "expected.npz")
    greedy = expected.get("greedy")
    return load_model(GOLDENS / case), expected["tokens"], expected["lengths"].tolist(), expected["logits"], greedy


@jax.jit
def forward(model, tokens, cache, counts):
    hidden, cache = model(tokens, cache, counts)
    return model.logits(hidden), cache


def check(case, pieces, rows, width, slots):
    """Feed the rows in consecutive pieces of the given sizes, each padded to `width`, and compare every logit."""
    model, tokens, lengths, expected, _ = golden(case)
    lengths = np.array(lengths)[rows]
    cache = model.init_cache(len(rows), slots)
    at = 0
    for size in pieces:
        piece = np.zeros((len(rows), width), np.int32)
        piece[:, :size] = tokens[rows, at : at + size]
        counts = np.clip(lengths - at, 0, size).astype(np.int32)
        found, cache = forward(model, piece, cache, counts)
        assert np.isfinite(found).all()  # padding too
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            np.testing.assert_allclose(found[i, :count], expected[row, at : at + count], rtol=0, atol=BOUND)
        at += size
    np.testing.assert_array_equal(cache.length, lengths)


def test_there_are_goldens_of_every_family():
    assert len(CASES) >= 14


@pytest.mark.parametrize("case", CASES)
def test_prefill_of_each_row_alone(case):
    """With slots that exactly fit the longest row."""
    for row in range(3):
        check(case, [WIDTH], [row], WIDTH, slots=WIDTH)


@pytest.mark.parametrize("case", CASES)
def test_ragged_batch(case):
    check(case, [WIDTH], [0, 1, 2], WIDTH, slots=47)


@pytest.mark.parametrize("case", STEPPED)
def test_seven_then_the_rest(case):
    """The first piece leaves one row at its end, so it feeds nothing to the second."""
    check(case, [7, WIDTH - 7], [0, 1, 2], WIDTH, slots=47)


@pytest.mark.parametrize("case", STEPPED)
def test_step_by_step(case):
    check(case, [1] * WIDTH, [0, 1, 2], width=1, slots=WIDTH)


@pytest.mark.parametrize("case", ["gemma3_text", "mixtral", "qwen2_window"])
def test_step_by_step_of_one_row(case):
    check(case, [1] * WIDTH, [0], width=1, slots=47)


@pytest.mark.parametrize("case", STEPPED)
def test_greedy_continuation(case):
    model, tokens, lengths, _, greedy = golden(case)
    out = generate(Program(model), tokens, lengths, max_new_tokens=greedy.shape[1])
    np.testing.assert_array_equal(out.tokens, greedy)


@pytest.mark.parametrize("case", ["llama3", "gemma2", "qwen3_moe"])
def test_public_logits(case):
    model, tokens, lengths, expected, _ = golden(case)
    for row, length in enumerate(lengths[:2]):
        found = logits(Program(model), tokens[row : row + 1, :length])
        np.testing.assert_allclose(found[0], expected[row, :length], rtol=0, atol=BOUND)
