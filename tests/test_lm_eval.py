"""The adapter to lm-evaluation-harness: tiny local tasks through it, against the scores and texts computed directly."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.eval import lm_eval as adapter
from jaxinfer.eval.scoring import loglikelihood
from jaxinfer.eval.tasks import encode_pair
from jaxinfer.passes import apply
from jaxinfer.text.bytes import byte_tokenizer

harness = pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'jaxinfer[lm-eval]'")
EOS = 0
QUESTIONS = [
    {"question": "2 + 2 =", "choices": ["4", "five", "22"], "answer": 0},
    {"question": "The sky is", "choices": ["green today", "blue"], "answer": 1},
    {"question": "Water is", "choices": ["wet", "dry as a bone", "red"], "answer": 0},
]


@pytest.fixture(scope="module")
def program():
    """Return a random model of bytes, whose tokenizer has an end token."""
    tokenizer = dataclasses.replace(byte_tokenizer(), eos_id=EOS)
    return random_program(tiny_config(vocab_size=256, max_context=64), tokenizer=tokenizer, name="owner/bytes")


def request(*args):
    return SimpleNamespace(args=args)


def write_task(tmp_path, name, config, rows):
    data = tmp_path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **config}
    (tmp_path / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def run(program, tmp_path, name, config, rows, **options):
    """Return what the harness reports for a task of `rows`: its metrics and the record of each row."""
    write_task(tmp_path, name, config, rows)
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    out = harness.simple_evaluate(
        adapter.JaxinferLM(program, batch_size=4), tasks=[name], task_manager=manager, bootstrap_iters=0, **options
    )
    return out["results"][name], sorted(out["samples"][name], key=lambda record: record["doc_id"]), out["config"]


def test_a_multiple_choice_task_has_the_scores_of_the_scorer(program, tmp_path):
    config = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    metrics, records, info = run(program, tmp_path, "quiz", {**config, "doc_to_target": "answer"}, QUESTIONS)
    right = right_norm = 0
    for row, record in zip(QUESTIONS, records, strict=True):
        pairs = [encode_pair(program.tokenizer, row["question"], " " + choice) for choice in row["choices"]]
        want = loglikelihood(program, pairs)
        got = [answer[0] for answer in record["filtered_resps"]]
        np.testing.assert_allclose(got, [score.logprob for score in want], rtol=1e-6)
        values = np.array([score.logprob for score in want])
        right += values.argmax() == row["answer"]
        right_norm += (values / [len(choice) for choice in row["choices"]]).argmax() == row["answer"]
    assert metrics["acc,none"] == pytest.approx(right / 3) and metrics["acc_norm,none"] == pytest.approx(right_norm / 3)
    assert info["model"] == "JaxinferLM" and info["jaxinfer_model"] == "owner/bytes" and info["jaxinfer_passes"] == []


def test_a_generation_task_has_the_texts_of_generate(program, tmp_path):
    prompts = [{"prompt": p} for p in ("a", "bcd", "an odd and much longer prompt", "x")]
    whole = ji.generate_text(program.replace(stop_ids=()), [row["prompt"] for row in prompts], max_new_tokens=24)
    stop = max(set(whole[1]), key=whole[1].index)  # the character that comes last for the first time
    want = [text.split(stop)[0] for text in whole]
    assert 0 < len(want[1]) < len(whole[1])
    rows = [{**row, "target": text} for row, text in zip(prompts, want, strict=True)]
    config = {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target}}",
        "generation_kwargs": {"until": [stop], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    metrics, records, _ = run(program, tmp_path, "echo", config, rows)
    assert [record["resps"][0][0] for record in records] == want
    assert metrics["exact_match,none"] == 1


def test_rolling_scores_every_token_once(program):
    lm = adapter.JaxinferLM(program, batch_size=2)
    texts = ["short", "x" * 20 + "y" * 150, ""]  # the second needs three windows of 64
    got = lm.loglikelihood_rolling([request(text) for text in texts], disable_tqdm=True)
    short = loglikelihood(program, [([EOS], program.tokenizer.encode("short"))])[0].logprob
    ids = program.tokenizer.encode(texts[1])
    windows = [([EOS], ids[:64]), ([ids[63]], ids[64:128]), (ids[105:128], ids[128:])]
    assert got[0] == pytest.approx(short, rel=1e-6) and got[2] == 0
    assert got[1] == pytest.approx(sum(s.logprob for s in loglikelihood(program, windows)), rel=1e-6)


def test_an_empty_context_is_the_end_token(program):
    lm = adapter.JaxinferLM(program)
    (got,) = lm.loglikelihood([request("", "word")], disable_tqdm=True)
    want = loglikelihood(program, [([EOS], program.tokenizer.encode("word"))])[0]
    assert got == pytest.approx(tuple(want))
    bare = adapter.JaxinferLM(program.replace(tokenizer=byte_tokenizer()))
    with pytest.raises(InputError, match="no beginning or end token"):
        bare.loglikelihood([request("", "word")], disable_tqdm=True)
    assert lm.loglikelihood([]) == [] and lm.generate_until([], disable_tqdm=True) == []


def test_long_prompts_are_cut_from_the_left(program):
    lm = adapter.JaxinferLM(program)
    long, options = "0123456789" * 9, {"max_gen_toks": 24, "until": []}
    assert lm.generate_until([request(long, options)], True) == lm.generate_until([request(long[-40:], options)], True)
    assert lm.generate_until([request(long, options)], True) != lm.generate_until([request(long[-30:], options)], True)
    (cut,), (tail,) = (lm.loglikelihood([request(text, " ab")], True) for text in (long, long[-62:]))
    assert cut == pytest.approx(tail)
    for length in (64, 0):
        with pytest.raises(InputError, match=f"max_gen_toks={length}: must be 1 or more and leave room .* in 64"):
            lm.generate_until([request("a", {"max_gen_toks": length})], True)


def test_sampling_is_by_request_and_not_by_batch(program):
    requests = [request("ab", {"do_sample": True, "temperature": 1.5, "max_gen_toks": 8})] * 3
    texts = [adapter.JaxinferLM(program, batch_size=size).generate_until(requests, True) for size in (1, 3)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert adapter.JaxinferLM(program, seed=9).generate_until(requests, True) != texts[0]
    greedy = ji.generate_text(program, "ab", max_new_tokens=8)
    for options in ({}, {"temperature": 1.5, "do_sample": False}, {"temperature": 1.5, "top_k": 1}):
        out = adapter.JaxinferLM(program).generate_until([request("ab", {"max_tokens": 8, **options})], True)
        assert out == [greedy]
    with pytest.warns(UserWarning, match="options num_beams have no counterpart"):
        adapter.JaxinferLM(program, max_gen_toks=8).generate_until([request("ab", {"num_beams": 4})], True)


def test_a_special_token_among_the_stop_strings_stops(program):
    tokenizer = program.tokenizer
    free = ji.generate(program, [tokenizer.encode("ab")], max_new_tokens=12).tokens[0].tolist()
    token = tokenizer.backend.id_to_token(free[4])
    marked = byte_tokenizer()
    marked.backend.add_special_tokens([token])
    lm = adapter.JaxinferLM(program.replace(tokenizer=marked), max_gen_toks=12)
    (text,) = lm.generate_until([request("ab", {"until": [token]})], True)
    assert text == marked.decode(free[: free.index(free[4])])


def test_chats_are_written_by_the_template(program):
    lm = adapter.JaxinferLM(program)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello "}]
    assert lm.apply_chat_template(turns[:1]) == "user: Hi\nassistant: "
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == "user: Hi\nassistant: Hello"
    assert lm.tokenizer_name == "owner__bytes"
    assert lm.chat_template(True) == program.tokenizer.chat_template and lm.chat_template(False) == ""


def test_a_beginning_token_that_the_text_has_is_not_added_again(stories):
    lm, tokenizer = adapter.JaxinferLM(stories), stories.tokenizer
    bos = tokenizer.backend.id_to_token(tokenizer.bos_id)
    options = {"max_gen_toks": 8}
    plain, written = (
        (lm.loglikelihood([request(t, " time")], True), lm.generate_until([request(t, options)], True))
        for t in ("Once upon a", bos + "Once upon a")
    )
    assert plain[1] == written[1] and plain[0][0] == pytest.approx(written[0][0])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "pretrained=None: give one model"),
        ({"pretrained": "a", "program": True}, "pretrained='a': give one model"),
        ({"program": True, "batch_size": "auto"}, "batch_size='auto': must be a whole number"),
        ({"program": True, "batch_size": 0}, "batch_size=0: must be a whole number"),
        ({"program": True, "parallelize": True}, "model argument 'parallelize': does not exist; there are pretrained"),
    ],
)
def test_bad_model_arguments_are_refused(program, arguments, message):
    arguments = {**arguments, "program": program} if arguments.get("program") else arguments
    with pytest.raises(InputError, match=message):
        adapter.JaxinferLM(**arguments)


def test_an_argument_string_loads_a_model(program, tmp_path):
    ji.save(program, tmp_path / "saved")
    lm = adapter.JaxinferLM.create_from_arg_string(f"pretrained={tmp_path / 'saved'},max_gen_toks=8", {"batch_size": 2})
    assert (lm.batch_size, lm.max_gen_toks) == (2, 8)
    want = ji.generate_text(ji.load(tmp_path / "saved"), "ab", max_new_tokens=8)
    assert lm.generate_until([request("ab", {})], True) == [want]
    with pytest.raises(InputError, match="keep_quantized is for GGUF files"):
        adapter.JaxinferLM.create_from_arg_string(f"pretrained={tmp_path / 'saved'},keep_quantized=True")


@pytest.mark.parametrize("passes", ["int4:group=8;symmetric=false+w8a8:skip=.*;embedding=false", None])
def test_passes_are_applied(program, passes):
    specs = [("int4", {"group": 8, "symmetric": False})]
    if passes is None:
        lm, passes = adapter.JaxinferLM(program, passes=["int4:group=8,symmetric=false"]), specs
    else:
        with pytest.raises(InputError, match="w8a8 after int4"):
            adapter.JaxinferLM(program, passes=passes)
        lm = adapter.JaxinferLM(program, passes=passes.split("+")[0])
    (got,) = lm.loglikelihood([request("a b", " c d")], True)
    pair = encode_pair(program.tokenizer, "a b", " c d")
    (want,), (plain,) = (loglikelihood(p, [pair]) for p in (apply(program, *specs), program))
    assert got == pytest.approx(tuple(want)) and got[0] != pytest.approx(plain.logprob)
    assert lm.get_model_info()["jaxinfer_passes"][0][0] == "int4"


def test_the_command_runs_a_task(program, tmp_path, monkeypatch, capsys):
    ji.save(program, tmp_path / "saved")
    config = {"output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}"}
    write_task(tmp_path, "quiz", {**config, "doc_to_target": "answer"}, QUESTIONS)
    model = f"pretrained={tmp_path / 'saved'},passes=int4:group=8"
    options = ["--model", "jaxinfer", "--model_args", model, "--include_path", str(tmp_path), "--tasks", "quiz"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options, "--batch_size", "4"])
    assert adapter.main() == 0
    assert f"'pretrained': '{tmp_path / 'saved'}'" in (out := capsys.readouterr().out) and "|acc_norm|" in out
    monkeypatch.setattr(sys, "argv", ["lm_eval", *options[:3], "pretrained=no-such-model", *options[4:]])
    assert adapter.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model 'no-such-model': no such path")


def test_the_command_knows_the_model_and_the_harness_needs_no_torch():
    code = (
        "import sys, jaxinfer.eval.lm_eval as a; from lm_eval.api.registry import get_model; import lm_eval.evaluator;"
        "assert get_model('jaxinfer') is a.JaxinferLM and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_the_harness_one_line_says_what_to_install(program, monkeypatch, capsys):
    monkeypatch.setattr(adapter, "LM", None)
    with pytest.raises(InputError, match=r"lm_eval is missing: pip install 'jaxinfer\[lm-eval\]'"):
        adapter.JaxinferLM(program)
    assert adapter.main() == 2 and capsys.readouterr().err.count("\n") == 1
