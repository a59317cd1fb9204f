"""The commands that read and write files: batches of prompts and evaluation, and how they resume."""

import json
import time

import pytest
from command import TINY, caller, lines_of, process, stories_path
from data import data_dir

import jaxinfer as ji
from jaxinfer.eval.perplexity import perplexity
from jaxinfer.session import Session

PROMPTS = ["Once upon a time", "Lily and Tom", "The dog was", "One day, a", "Ben"]


@pytest.fixture
def model():
    return stories_path()


@pytest.fixture
def cli(capsys):
    return caller(capsys)


def write_prompts(path, prompts=PROMPTS):
    path.write_text("".join(json.dumps({"prompt": p, "id": f"p{i}"}) + "\n" for i, p in enumerate(prompts)))
    return path


def batch(model, prompts, out, *more):
    options = ("--model", model, "--dtype", "float32", "--max-new-tokens", 24, "--temperature", 0.7, "--seed", 5)
    return ["generate", "--prompts", prompts, "--out", out, *options, *more]


def test_a_file_of_prompts_is_answered_as_each_alone(cli, model, tmp_path):
    prompts, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "out.jsonl"
    status, _, err = cli(*batch(model, prompts, out, "--batch-size", 2))
    assert status == 0 and "5/5" in err
    rows = sorted(lines_of(out), key=lambda row: row["index"])
    program = ji.load(model, dtype="float32")
    assert [row["prompt"] for row in rows] == PROMPTS and [row["id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    alone = [ji.generate_text(program, p, 24, temperature=0.7, seed=5 + i) for i, p in enumerate(PROMPTS)]
    assert [row["text"] for row in rows] == alone
    assert all(row["tokens"] == 24 and row["finish"] == "length" for row in rows)
    before = out.read_bytes()
    assert cli(*batch(model, prompts, out, "--batch-size", 2))[0] == 0 and out.read_bytes() == before


def test_an_interrupted_file_is_continued(cli, model, tmp_path, monkeypatch):
    prompts, whole, out = write_prompts(tmp_path / "p.jsonl"), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    cli(*batch(model, prompts, whole, "--batch-size", 2))
    fed = []
    feed = Session.feed

    def stop_in_the_second_batch(self, rows, *args, **options):
        fed.append(sum(map(bool, rows)))
        if len(fed) == 2:
            raise KeyboardInterrupt
        return feed(self, rows, *args, **options)

    monkeypatch.setattr(Session, "feed", stop_in_the_second_batch)
    status, _, err = cli(*batch(model, prompts, out, "--batch-size", 3))
    assert status == 130 and "interrupted" in err and len(lines_of(out)) == 3
    torn = out.read_bytes()[:-7]  # as if killed in the middle of the third line
    out.write_bytes(torn)
    assert cli(*batch(model, prompts, out, "--batch-size", 2))[0] == 0
    assert fed[2:] == [2, 1]  # the three that were missing
    key = lambda row: row["index"]  # noqa: E731
    assert sorted(lines_of(out), key=key) == sorted(lines_of(whole), key=key)


@pytest.mark.parametrize("change", [["--seed", 6], ["--chat"], ["--top-k", 3]], ids=lambda c: c[0])
def test_another_run_does_not_mix_with_the_file(cli, tmp_path, change):
    prompts, out = write_prompts(tmp_path / "p.jsonl", ["a"]), tmp_path / "out.jsonl"
    base = ["generate", "--prompts", prompts, "--out", out, "--config", TINY, "--max-new-tokens", 2, "--batch-size", 1]
    assert cli(*base)[0] == 0
    before = out.read_bytes()
    status, _, err = cli(*base, *change)
    assert status == 2 and "out.jsonl, line 1: made by a run with other options;" in err
    write_prompts(prompts, ["b"])
    assert "with other prompts;" in cli(*base)[2] and out.read_bytes() == before


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": }', "p.jsonl, line 3: not JSON"),
        ('{"text": "a"}', "p.jsonl, line 3: has no key 'prompt', its keys are 'text'"),
        ('{"prompt": 3}', "p.jsonl, line 3: 'prompt' is '3': must be a string"),
        ('{"prompt": ""}', "p.jsonl, line 3: 'prompt' is empty"),
        (json.dumps({"prompt": "x" * 256}), "p.jsonl, line 3: 'prompt' is 256 tokens: must be 1..255"),
        (r'{"prompt": "\ud800"}', "p.jsonl, line 3: text has the lone surrogate"),
    ],
)
def test_a_bad_row_is_told_by_its_line_before_any_work(cli, tmp_path, line, message):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(f'{{"prompt": "a"}}\n\n{line}\n{{"prompt": "b"}}\n')
    status, _, err = cli("generate", "--prompts", prompts, "--out", out, "--config", TINY)
    assert status == 2 and message in err and not out.exists()


def test_a_killed_process_loses_at_most_a_batch(cli, tmp_path):
    prompts, out = write_prompts(tmp_path / "p.jsonl", [f"prompt {i}" for i in range(400)]), tmp_path / "out.jsonl"
    argv = ["generate", "--prompts", prompts, "--out", out, "--config", TINY, "--batch-size", 2]
    child = process(*argv, "--max-new-tokens", 32)
    until = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < until and not (out.exists() and out.stat().st_size > 1000):
        time.sleep(0.02)
    child.kill()
    child.communicate()
    done = out.read_bytes()
    finished = done.count(b"\n")
    assert 2 < finished < 400
    write_prompts(prompts, [f"prompt {i}" for i in range(400)])  # the same file, written again
    with open(out, "ab") as f:
        f.write(b'{"run": "prom')
    config = [*argv[:-1], 100, "--max-new-tokens", 32]
    assert cli(*config)[0] == 0
    rows = lines_of(out)
    assert sorted(row["index"] for row in rows) == list(range(400)) and out.read_bytes().startswith(
        done[: done.rindex(b"\n") + 1]
    )


def test_eval_prints_a_table_or_json_and_resumes(cli, model, tmp_path):
    data = data_dir() / "lambada" / "test_dev.jsonl.gz"
    base = ["eval", "--task", "lambada", "--data", data, "--model", model, "--dtype", "float32", "--batch-size", 4]
    status, out, _ = cli(*base, "--limit", 4, "--json", "--out", tmp_path / "s.jsonl")
    report = json.loads(out)
    assert (
        status == 0 and report["n"] == 4 and report["resumed"] == 0 and set(report["metrics"]) == {"acc", "perplexity"}
    )
    assert report["dtype"] == "float32" and report["seconds"] > 0 and report["tokens_per_second"] > 0
    assert len(lines_of(tmp_path / "s.jsonl")) == 4
    again = json.loads(cli(*base, "--limit", 5, "--json", "--out", tmp_path / "s.jsonl")[1])
    assert again["resumed"] == 4 and again["n"] == 5 and len(lines_of(tmp_path / "s.jsonl")) == 5
    status, out, _ = cli(*base, "--limit", 5, "--out", tmp_path / "s.jsonl")
    assert "perplexity" in out and "5 rows" in out and "5 items taken from --out" in out
    swag = data_dir() / "hellaswag" / "val_dev.jsonl.gz"
    assert "other task and other data" in cli("eval", "--task", "hellaswag", "--data", swag, "--model", model,
        "--dtype", "float32", "--out", tmp_path / "s.jsonl")[2]  # fmt: skip


def test_eval_perplexity_is_the_function(cli, model, tmp_path):
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. " * 3
    (tmp_path / "a.txt").write_text(text)
    base = ["eval", "--task", "perplexity", "--data", tmp_path / "a.txt", "--model", model, "--dtype", "float32"]
    report = json.loads(cli(*base, "--window", 32, "--max-tokens", 70, "--json")[1])
    program = ji.load(model, dtype="float32")
    tokens = program.tokenizer.encode(text)[:70]
    assert report["metrics"]["perplexity"] == pytest.approx(perplexity(program, tokens, 32)) and report["n"] == 67
    (tmp_path / "b.txt").write_text("")
    assert "b.txt: is empty" in cli(*base, "--data", tmp_path / "b.txt")[2]
    assert "--limit: not an option of --task perplexity" in cli(*base, "--limit", 3)[2]


def test_eval_tells_the_line_of_a_bad_row(cli, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"context": "a b", "continuation": "c"}\n{"context": "a b"}\n')
    status, _, err = cli("eval", "--task", "lambada", "--data", tmp_path / "a.jsonl", "--config", TINY)
    assert status == 2 and "a.jsonl, line 2: has no key 'continuation'" in err
