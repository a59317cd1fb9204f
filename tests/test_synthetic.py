"""Speculation by given chances: its tokens a step are the known ones, its steps are real, and mistakes are one line."""

import pytest
from command import caller
from models import random_program, tiny_config

from jaxinfer.errors import InputError
from jaxinfer.eval.spec_bench import Answer, summary
from jaxinfer.eval.synthetic import NAME, AnyTokens, Shape, SyntheticSpeculation, measure
from jaxinfer.generation import generate


@pytest.mark.parametrize(("chance", "length"), [(0.0, 3), (0.6, 4), (1.0, 2)])
def test_tokens_a_step_follow_the_chance(chance, length):
    shape = Shape([chance], length, context=40, texts=2, new_tokens=400, adapt=False)
    program = random_program(tiny_config(max_context=1024))
    records = list(measure(program, shape))
    assert [r["category"] for r in records] == [f"{chance:g} stand"] * 2
    fast, plain = ([Answer(**r["answers"][name]) for r in records] for name in (NAME, ""))
    assert all(len(a.tokens) == 400 for a in (*fast, *plain))
    expected = SyntheticSpeculation(AnyTokens(length=length), acceptance=chance).expected
    assert expected == pytest.approx(length + 1 if chance == 1 else (1 - chance ** (length + 1)) / (1 - chance))
    found = summary(fast, plain)
    assert found["tokens_per_step"] == pytest.approx(expected, rel=0.02 if chance in (0, 1) else 0.12)
    assert all(len(a.check) == 2 and sum(a.checked) == a.steps for a in fast)


def test_drafts_that_never_stand_leave_the_text_as_it_is():
    program = random_program(tiny_config())
    decoder = SyntheticSpeculation(AnyTokens(length=3), acceptance=0.0)
    expected = generate(program, [[3, 4, 5]], max_new_tokens=20, stop_ids=())
    found = generate(program.replace(decoder=decoder), [[3, 4, 5]], max_new_tokens=20, stop_ids=())
    assert found.tokens.tolist() == expected.tokens.tolist()


def test_the_command_prints_a_line_a_chance(tmp_path, capsys):
    command = ("spec-bench", "smollm2-135m", "--acceptance", 0.5, 0.9, "--texts", 1, "--context", 16)
    shape = tiny_config(max_context=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.plan.shapes.find_shape", lambda name: (shape, ()))
        options = ("--random-weights", "--draft-length", 2, "--max-new-tokens", 12, "--out", tmp_path / "out")
        status, out, errors = caller(capsys)(*command, *options)
    assert status == 0, errors
    assert "| synthetic | 0.5 stand | 1 |" in out and "| synthetic | 0.9 stand | 1 |" in out
    assert all(line.endswith("| - |") for line in out.splitlines()[2:])
    assert (tmp_path / "out" / "spec_bench.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--acceptance", 1.5, "--random-weights"), "acceptance=1.5: must be from 0 to 1"),
        (("--acceptance", 0.5, "--data", "x"), "--data: is not for --acceptance; leave it out"),
        (("--drafters", "ngram", "--data", "x", "--random-weights"), "--random-weights: is only for --acceptance"),
        (("--drafters", "ngram"), "--data is missing: give --drafters and --data, or --acceptance alone"),
        (("--acceptance", 0.5, "--draft-length", 0), "--draft-length=0: must be 1 or more"),
    ],
)
def test_mistakes_are_one_line(options, said, capsys, monkeypatch):
    monkeypatch.setattr("jaxinfer.cli.options.random_weights", lambda *_: random_program(tiny_config()))
    status, _, errors = caller(capsys)("spec-bench", "smollm2-135m", *options)
    assert status == 2 and said in errors and len(errors.strip().splitlines()) == 1


def test_a_chance_that_is_none_is_refused():
    with pytest.raises(InputError, match="length=0: must be 1 token or more"):
        AnyTokens(length=0)
