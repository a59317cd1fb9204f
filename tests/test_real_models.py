"""Real pretrained models against transformers on the same files: greedy tokens and perplexity."""

import json
import lzma
from pathlib import Path

import pytest
from data import data_dir

import jaxinfer as ji
from jaxinfer.errors import InputError

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "models.json").read_text())
TIE = 1e-3  # logits this close may be ordered either way by float32 rounding


pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module", params=["stories260K", "smollm2-135m"])
def real(request):
    """A program in float32 and what transformers computed with it."""
    if data_dir() is None:
        pytest.skip("the data folder is absent: set JAXINFER_DATA")
    if request.param == "stories260K":
        return ji.load(data_dir() / "models" / "stories260K", dtype="float32"), GOLDENS["stories260K"]
    try:
        return ji.load("smollm2-135m", dtype="float32"), GOLDENS["smollm2-135m"]
    except InputError as e:
        pytest.skip(f"SmolLM2-135M could not be fetched: {e}")


def test_the_first_64_greedy_tokens_are_those_of_transformers(real):
    program, golden = real
    rows = golden["greedy"]
    for row in rows:
        assert program.tokenizer.encode(row["prompt"]) == row["ids"]
    out = ji.generate(program, [row["ids"] for row in rows], max_new_tokens=64, stop_ids=())
    for row, tokens in zip(rows, out.tokens, strict=True):
        differs = [i for i, (a, b) in enumerate(zip(tokens.tolist(), row["tokens"], strict=True)) if a != b]
        if differs:
            first = differs[0]
            gap = row["gaps"][first]
            assert gap < TIE, f"{row['prompt']!r}: token {first} differs, and the best two logits are {gap} apart"


def test_perplexity_is_that_of_transformers(real):
    program, golden = real
    text = lzma.decompress((data_dir() / "wikitext2" / "valid.tokens.xz").read_bytes()).decode()
    ids = program.tokenizer.encode(text[:400_000])[:20_000]
    assert ids[:32] == golden["first_ids"] and sum(ids) == golden["sum_of_ids"]
    assert ji.perplexity(program, ids, window=512) == pytest.approx(golden["perplexity"], rel=1e-3)


def test_chat_of_the_real_model_keeps_to_its_template(real):
    program, _ = real
    if program.tokenizer.chat_template is None:
        pytest.skip("this model has no chat template")
    text = program.tokenizer.apply_chat([{"role": "user", "content": "What is 2 + 2?"}])
    ids = program.tokenizer.encode(text, add_special=False)
    out = ji.generate(program, [ids], max_new_tokens=48)
    assert out.stopped == [True]
    assert "4" in program.tokenizer.decode(out.tokens[0, : out.lengths[0]])
