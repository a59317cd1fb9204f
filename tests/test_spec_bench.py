"""jaxinfer spec-bench end to end on a small model, and what it says of mistakes."""

import dataclasses
import json

import pytest
from command import caller, lines_of, stories_path

from jaxinfer.eval.spec_bench import Answer, summary
from jaxinfer.eval.spec_table import draw, markdown, table

QUESTIONS = [
    {"category": "writing", "turns": ["Tom had a red ball. Tom had a red ball. Tom had a"]},
    {"category": "qa", "turns": ["Once upon a time", "and then"]},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


def test_drafters_answer_in_turns_with_plain_decoding(questions, tmp_path, capsys):
    run, out = caller(capsys), tmp_path / "out"
    args = ("spec-bench", stories_path(), "--drafters", "ngram", "--data", questions, "--max-new-tokens", 24)
    status, first, errors = run(*args, "--out", out)
    assert status == 0, errors
    lines = lines_of(out / "spec_bench.jsonl")
    assert [line["category"] for line in lines] == ["mt_bench", "qa"]
    for line in lines:
        plain, fast = line["answers"][""], line["answers"]["ngram"]
        assert fast["tokens"] == plain["tokens"] and line["gap"] == {"ngram": 0.0}
        assert sum(fast["checked"]) == fast["steps"] <= plain["steps"] == len(plain["tokens"]) - 1
        assert len(fast["check"]) == len(fast["draft"]) == len(fast["checked"]) and fast["check"][0] == 1
        assert min(plain["decode"], fast["decode"], plain["prefill"], *fast["check"]) > 0
    assert "| ngram | mt_bench | 1 |" in first and "| ngram | all | 2 |" in first
    assert (out / "spec_bench.png").stat().st_size > 10_000
    assert run(*args, "--out", out)[:2] == (0, first)  # nothing is asked twice
    status, _, errors = run(*args[:-1], 25, "--out", out)
    assert status == 2 and "options" in errors and len(errors.strip().splitlines()) == 1


def test_generate_speculates_and_writes_the_same(capsys):
    run = caller(capsys)
    args = ("generate", "Once upon a time", "--model", stories_path(), "--max-new-tokens", 24, "--temperature", 0.8)
    plain, fast = (run(*args, *more) for more in ((), ("--drafter", "ngram:least=1,length=3")))
    assert plain[0] == fast[0] == 0 and plain[1] == fast[1] and len(plain[1]) > 20
    status, _, errors = run(*args, "--drafter", "ngram", "--verifier", "blck")
    assert status == 2 and "verifier='blck': did you mean 'block'" in errors


def test_an_answer_that_ends_early_is_no_gain():
    """Speeds are those of a token, in all and in each question."""
    costs = dict(steps=10, checked=[10, 0], check=[1.0, 2.0], draft=[0.0, 0.0])
    short, long = Answer([1] * 11, 1.0, 1.0, **costs), Answer([1] * 41, 1.0, 4.0, steps=40)
    found = summary([short], [long])
    assert [found[key] for key in ("speedup", "speedup_p10", "predicted", "whole")] == pytest.approx([1, 1, 1, 1])
    nothing = summary([dataclasses.replace(short, tokens=[1])], [long])
    assert nothing["speedup"] == nothing["whole"] == 1 and nothing["same"] == 0


def record(category, plain, fast, steps, checked):
    def answer(decode, **more):
        return vars(Answer(tokens=[1] * 41, prefill=1.0, decode=decode, **more))

    costs = dict(check=[1.0, 2.0], draft=[0.0, 0.5])
    return {
        "category": category,
        "answers": {"": answer(plain, steps=40), "d": answer(fast, steps=steps, checked=checked, **costs)},
        "gap": {"d": 0.0},
    }


def test_the_prediction_is_tokens_a_step_over_what_a_step_costs(tmp_path):
    records = [record("a", 4.0, 2.0, 16, [8, 8]), record("b", 4.0, 4.0, 40, [40, 0])]
    rows = {row["category"]: row for row in table(records, ["d"])}
    a = rows["a"]
    assert a["tokens_per_step"] == 40 / 16 and a["speedup"] == 2 and a["checked_share"] == 0.5
    assert a["predicted"] == 40 / (8 * 1 + 8 * 2.5) and a["draft_share"] == pytest.approx(4 / 28)
    assert rows["b"]["predicted"] == 1 and rows["all"]["speedup"] == pytest.approx(8 / 6) and a["whole"] == 5 / 3
    assert "| d | all | 2 | 1.43 |" in markdown(records, ["d"])
    draw(records, ["d"], tmp_path / "x.png")
    assert summary([Answer(**records[0]["answers"]["d"])], [Answer(**records[0]["answers"][""])])["same"] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--drafters", "ngrm"), "no drafter 'ngrm': did you mean 'ngram'"),
        (("--drafters", "exit:layer=3"), "exit has no option 'layer'"),
        (("--drafters", "ngram", "--categories", "poems"), "--categories poems: "),
        (("--drafters", "ngram", "--per-category", "0"), "--per-category=0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(args, message, questions, capsys):
    status, _, errors = caller(capsys)("spec-bench", "--data", questions, *args)
    assert status == 2 and message in errors and len(errors.strip().splitlines()) == 1, errors
