"""Evaluation: scores against a direct computation, the published loss of a real model, the tasks' fine print."""

import gzip
import json
import lzma
import math

import numpy as np
import pytest
from data import data_dir

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.eval import data, tasks
from jaxinfer.eval.journal import Journal, fingerprint
from jaxinfer.eval.perplexity import perplexity, score_text
from jaxinfer.eval.scoring import loglikelihood
from jaxinfer.text.bytes import byte_tokenizer


def direct(program, context, continuation):
    """Return the score computed from `ji.logits` with numpy, in float64."""
    tokens = [*context, *continuation]
    padded = np.zeros((1, max(64, 1 << (len(tokens) - 2).bit_length())), np.int32)  # what follows changes nothing
    padded[0, : len(tokens) - 1] = tokens[:-1]
    logits = np.asarray(ji.logits(program, padded), np.float64)[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logp -= logits.max(-1, keepdims=True)
    places = range(len(context) - 1, len(tokens) - 1)
    value = sum(logp[t, tokens[t + 1]] for t in places)
    return value, all(logp[t].argmax() == tokens[t + 1] for t in places)


def random_pairs(vocab, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab, n).tolist() for n in pair) for pair in lengths]


def test_loglikelihood_is_the_sum_of_log_softmax(tiny):
    pairs = random_pairs(tiny.config.vocab_size, [(5, 3), (1, 1), (30, 20), (1, 40), (17, 9)])
    # One continuation that is greedy by construction.
    start = [3, 1, 4]
    out = ji.generate(tiny, [start], max_new_tokens=4, stop_ids=()).tokens[0].tolist()
    pairs.append((start, out))
    got = loglikelihood(tiny, pairs, batch_size=4)
    want = [direct(tiny, *pair) for pair in pairs]
    np.testing.assert_allclose([s.logprob for s in got], [v for v, _ in want], rtol=1e-5, atol=1e-4)
    assert [s.greedy for s in got] == [g for _, g in want]
    assert got[-1].greedy and not got[0].greedy


def test_loglikelihood_does_not_depend_on_the_batch(tiny):
    pairs = random_pairs(tiny.config.vocab_size, [(30, 3), (30, 20), (25, 9)])
    alone = [loglikelihood(tiny, [pair])[0].logprob for pair in pairs]
    together = [s.logprob for s in loglikelihood(tiny, pairs, batch_size=3)]
    np.testing.assert_allclose(alone, together, rtol=1e-6, atol=1e-5)


def test_long_contexts_are_cut_from_the_left_and_scored_in_chunks(tiny, monkeypatch):
    limit = tiny.config.max_context
    [(context, continuation)] = random_pairs(tiny.config.vocab_size, [(limit + 30, 10)])
    want = direct(tiny, context[-(limit + 1 - 10) :], continuation)[0]
    assert loglikelihood(tiny, [(context, continuation)])[0].logprob == pytest.approx(want, abs=1e-4)
    monkeypatch.setattr("jaxinfer.decode.loop.CHUNK", 192)
    assert loglikelihood(tiny, [(context, continuation)])[0].logprob == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    "pair, message",
    [
        (([], [1]), "context is empty"),
        (([1], []), "continuation is empty"),
        (([1], [96]), "outside 0..95"),
        (([1], [1] * 513), "context is 512"),
    ],
)
def test_bad_pairs_are_refused(tiny, pair, message):
    with pytest.raises(InputError, match=f"pair 0: .*{message}"):
        loglikelihood(tiny, [pair])


def test_stories_reach_their_published_loss(stories):
    text = data.read_text(data_dir() / "tinystories" / "dev.txt.xz")
    rows = [stories.tokenizer.encode(story.strip())[:512] for story in text.split("<|endoftext|>")[:20]]
    scores = loglikelihood(stories, [(row[:1], row[1:]) for row in rows])
    nats = -sum(score.logprob for score in scores) / sum(len(row) - 1 for row in rows)
    assert nats == pytest.approx(1.2776, abs=1e-3)


def test_perplexity_scores_every_window_alone(tiny):
    tokens = random_pairs(tiny.config.vocab_size, [(100, 1)])[0][0][:97]
    result = score_text(tiny, tokens, window=32, batch_size=2)
    windows = [tokens[i : i + 32] for i in range(0, 96, 32)]  # the 97th is alone in its window: not scored
    nats = [-direct(tiny, w[:1], w[1:])[0] for w in windows]
    assert (result.windows, result.tokens_scored) == (3, 93)
    assert result.nats == pytest.approx(sum(nats) / 93, rel=1e-5)
    assert result.value == pytest.approx(math.exp(result.nats)) == perplexity(tiny, np.array(tokens), 32)
    assert result.stderr == pytest.approx(result.value * np.std(np.array(nats) / 31, ddof=1) / math.sqrt(3), rel=1e-3)


def test_perplexity_of_text_and_its_refusals(stories, tiny):
    text = "Once upon a time, there was a little girl named Lily."
    assert perplexity(stories, text) == perplexity(stories, stories.tokenizer.encode(text)) < 5
    with pytest.raises(InputError, match=r"window=513: must be in 2\.\.512"):
        perplexity(tiny, [1, 2, 3], window=513)
    with pytest.raises(InputError, match="needs 2 or more"):
        perplexity(tiny, [1])
    with pytest.raises(InputError, match="no tokenizer"):
        perplexity(tiny, "text")


def test_hellaswag_rows_are_read_as_published_or_prepared():
    row = {
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.",
        "ctx_b": "he",
        "endings": ["is using wrap.", "[substeps] Stop [title] Go on.  Now."],
        "label": "1",
    }
    question = tasks.hellaswag_question(row)
    assert question == (
        "Roof shingle removal: A man is sitting on a roof. He",
        ["is using wrap.", " Stop. Go on. Now."],
        1,
    )
    prepared = {"ctx": " [header] How to cook [title] Buy food. ", "endings": ["a", "b"], "label": 0}
    assert tasks.hellaswag_question(prepared) == (" How to cook. Buy food.", ["a", "b"], 0)
    assert tasks.lambada_question({"text": "He said to Ann\n"}) == ("He said to", "Ann")
    assert tasks.lambada_question({"context": "He said to ", "continuation": "Ann"}) == ("He said to", "Ann")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"endings": None}, "'endings' is 'None': must be a list"),
        ({"label": 2}, "'label' is 2: must be a number in 0..1"),
        ({"label": True}, "must be a number"),
        ({"ctx": "[header]"}, "context is empty"),
        ({"endings": ["a", ""]}, "must be a list of strings that are not empty"),
    ],
)
def test_bad_hellaswag_rows_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        tasks.hellaswag_question({"ctx": "c", "endings": ["a", "b"], "label": 0, **change})


def test_a_pair_is_the_whole_text_cut_in_two(stories):
    tokenizer = stories.tokenizer
    context, continuation = tasks.encode_pair(tokenizer, "Once upon a ", "time")
    assert [*context, *continuation] == tokenizer.encode("Once upon a time")
    assert context == tokenizer.encode("Once upon a") and tokenizer.decode(continuation).strip() == "time"
    assert tasks.encode_pair(byte_tokenizer(), "ab", " c") == (
        byte_tokenizer().encode("ab"),
        byte_tokenizer().encode(" c"),
    )


def test_hellaswag_agrees_with_a_direct_computation(stories):
    rows = [row for _, row in data.read_jsonl(data_dir() / "hellaswag" / "val_dev.jsonl.gz")][:3]
    result = tasks.hellaswag(stories, rows, batch_size=4)
    acc = norm = 0
    for row in rows:
        pairs = [tasks.encode_pair(stories.tokenizer, row["ctx"], " " + ending) for ending in row["endings"]]
        values = np.array([direct(stories, *pair)[0] for pair in pairs])
        acc += values.argmax() == row["label"]
        norm += (values / [len(ending.encode()) for ending in row["endings"]]).argmax() == row["label"]
    assert result.n == 3 and result.metrics == {"acc": pytest.approx(acc / 3), "acc_norm": pytest.approx(norm / 3)}
    p = acc / 3
    assert result.stderr["acc"] == pytest.approx(math.sqrt(p * (1 - p) / 2))


def test_lambada_resumes_from_its_journal(stories, tmp_path):
    rows = [
        {"context": "Once upon a time, there was a little", "continuation": "girl"},
        {"context": "She was very happy and said, Thank", "continuation": "you"},
        {"context": "The dog ran to the", "continuation": "quantum"},
    ]
    run = {"task": "lambada", "model": fingerprint(stories)}
    whole = tasks.lambada(stories, rows)
    assert whole.metrics["acc"] >= 1 / 3 and not tasks.lambada(stories, rows[2:]).metrics["acc"]
    with Journal(tmp_path / "out.jsonl", **run) as journal:
        tasks.lambada(stories, rows, limit=2, journal=journal)
    with Journal(tmp_path / "out.jsonl", **run) as journal:
        assert sorted(journal.done) == [0, 1]
        journal.done[0]["logprob"] -= 300  # what is in the file is believed, not computed again
        resumed = tasks.lambada(stories, rows, journal=journal)
    assert sorted(journal.done) == [0, 1, 2]
    assert math.log(resumed.metrics["perplexity"] / whole.metrics["perplexity"]) == pytest.approx(100, abs=1e-6)
    with pytest.raises(InputError, match="line 1: made by a run with other task; give another --out"):
        Journal(tmp_path / "out.jsonl", **{**run, "task": "hellaswag"})


def test_a_journal_repairs_its_own_end_and_touches_no_other_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with Journal(path, task="a") as journal:
        journal.append(0, {"x": 1.5})
        journal.append(1, {"x": 2})
    whole = path.read_bytes()
    for cut in (1, 5, len(whole) - whole.index(b"\n") - 2):
        path.write_bytes(whole[:-cut])
        with Journal(path, task="a") as journal:
            assert journal.done == {0: {"x": 1.5}}
            journal.append(1, {"x": 2})
        assert path.read_bytes() == whole
    for other in (b"notes", b"notes\n", b'{"index": 1}\n', whole + b"x", b"[]\n"):
        path.write_bytes(other)
        with pytest.raises(InputError, match="not a line that this command wrote"):
            Journal(path, task="a")
        assert path.read_bytes() == other


def test_data_files_are_read_plain_or_compressed(tmp_path):
    rows = [{"prompt": "é"}, {"prompt": "b"}]
    text = json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1], ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz"):
        assert data.read_jsonl(tmp_path / name) == [(1, rows[0]), (3, rows[1])]
    (tmp_path / "a.txt").write_text("words")
    assert data.read_text(tmp_path / "a.txt") == "words"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"a\.jsonl, line 2: not JSON .*one JSON object"),
        ("a.jsonl", b"[1]\n", "line 1: a JSON list"),
        ("a.jsonl", b"\n \n", "is empty"),
        ("a.jsonl", b'{"a": "\xff"}\n', "line 1: byte 0xff is not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", b"no archive", "damaged .gz archive"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-20], "damaged .gz archive"),
        ("a.jsonl.xz", lzma.compress(b'{"a": 1}')[:-20], "damaged .xz archive"),
        (None, None, "no such file"),
    ],
)
def test_bad_data_files_are_refused(tmp_path, name, content, message):
    path = tmp_path / (name or "absent.jsonl")
    if name:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.read_jsonl(path)
