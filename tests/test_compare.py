"""The comparison: rows of known content, failures that are rows, runs that go on after a kill."""

import dataclasses
import json

import numpy as np
import pytest
from models import random_program, tiny_config

from jaxinfer.errors import InputError
from jaxinfer.eval import compare as compare_module
from jaxinfer.eval import roofline, size
from jaxinfer.eval.compare import compare
from jaxinfer.eval.results import Results, Settings, Variant, read_results

SETTINGS = Settings(window=32, max_tokens=100, limit=2, prompt_tokens=20, decode_tokens=4, rounds=2)
INT8, INT4 = Variant("int8", ("int8",)), Variant("rough", ("int4:group=16",))


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 96, 150).tolist()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Measure no machine: its limits are numbers here."""
    limits = lambda dtype: roofline.Machine("machine", 1e9, 1e12, dtype, "published")  # noqa: E731
    monkeypatch.setattr(roofline, "machine", limits)


@pytest.fixture
def applied(monkeypatch):
    """Return the list of what `apply` is called with."""
    calls = []
    real = compare_module.apply
    monkeypatch.setattr(compare_module, "apply", lambda p, *specs, **k: calls.append(specs) or real(p, *specs, **k))
    return calls


def test_rows_have_everything(tiny, text, tmp_path):
    rows = compare(tiny, [INT8, INT4], {"perplexity": text}, tmp_path, settings=SETTINGS, command="jaxinfer compare")
    assert [row["variant"] for row in rows] == ["baseline", "int8", "rough"] and rows == read_results(tmp_path)
    base, int8, rough = rows
    assert base["quality"]["kl"] == {"value": 0.0, "stderr": 0.0} and base["quality"]["top1"]["value"] == 1.0
    assert 0 < int8["quality"]["kl"]["value"] < rough["quality"]["kl"]["value"]
    assert base["size"]["weight_bytes"] == size.buffer_bytes(tiny.model) and base["size"]["kv_bytes_per_token"] == 256
    assert rough["size"]["weight_bytes"] < int8["size"]["weight_bytes"] < 0.4 * base["size"]["weight_bytes"]
    for row in rows:
        assert row["status"] == "ok" and row["command"] == "jaxinfer compare"
        timed = row["speed"]["rounds"]["variant"]
        speeds = [r["decoded"] / r["decode"] for r in timed]
        assert len(timed) == 2 and timed[0]["decoded"] == 3
        assert row["speed"]["decode"]["median"] == pytest.approx(np.median(speeds))
        base_speeds = [r["decoded"] / r["decode"] for r in row["speed"]["rounds"]["baseline"]]
        ratios = np.array(speeds) / base_speeds
        assert row["speed"]["decode"]["ratio"] == pytest.approx(np.median(ratios))
        prefill = roofline.prefill_flops(tiny, 20) * np.median([1 / r["prefill"] for r in timed]) / 1e12
        assert row["roofline"]["prefill"] == pytest.approx(prefill, rel=1e-6)
    read = roofline.decode_bytes(tiny, size.cache_cost(tiny), 22)
    assert base["roofline"]["decode"] == pytest.approx(base["speed"]["decode"]["median"] * read / 1e9)
    assert base["speed"]["decode"]["ratio"] == 1.0 and base["speed"]["prompt"] == "text"
    settings = base["settings"]
    assert (
        settings["window"] == 32
        and settings["seed"] == 0
        and {"jax", "jaxlib", "jaxinfer", "python"} == set(settings["versions"])
    )
    assert settings["device"] == roofline.device_name() and settings["dtype"] == "float32"


def test_tasks_have_their_metrics(stories, tmp_path):
    lambada = [{"context": "Once upon a time, there was a little", "continuation": "girl"}] * 3
    scenes = [{"ctx": "The dog ran", "endings": ["to the park.", "blue seven"], "label": 0}] * 3
    data = {"lambada": lambada, "hellaswag": scenes}
    [row] = compare(stories, [], data, tmp_path, settings=SETTINGS)
    names = {"lambada_acc", "lambada_perplexity", "hellaswag_acc", "hellaswag_acc_norm"}
    assert set(row["quality"]) == names and row["quality"]["hellaswag_acc"] == {"value": 1.0, "stderr": 0.0}
    assert row["speed"]["prompt"] == "random"  # there is no text to take it from


def test_a_failing_variant_is_a_row_and_the_run_goes_on(tiny, text, tmp_path, monkeypatch):
    real = compare_module.apply

    def apply(program, *specs, **options):
        if specs == ("fp8",):
            raise MemoryError("RESOURCE_EXHAUSTED:\n out of memory")
        return real(program, *specs, **options)

    monkeypatch.setattr(compare_module, "apply", apply)
    variants = [Variant("twice", ("int8", "int4")), Variant("big", ("fp8",)), INT8]
    notes = []
    rows = compare(tiny, variants, {"perplexity": text}, tmp_path, settings=SETTINGS, note=notes.append)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "ok"]
    assert rows[1]["error"].startswith("int4 after int8: ") and rows[1]["stage"] == "passes"
    assert rows[2]["error"] == "MemoryError: RESOURCE_EXHAUSTED: out of memory"
    assert any(line.startswith("[3/4] big: failed: MemoryError") for line in notes)


def test_what_was_measured_before_a_failure_is_kept(tiny, text, tmp_path, monkeypatch):
    real = compare_module.speed.measure_speed

    def measure(programs, *rest):
        if len(programs) > 1:
            raise RuntimeError("no")
        return real(programs, *rest)

    monkeypatch.setattr(compare_module.speed, "measure_speed", measure)
    row = compare(tiny, [INT8], {"perplexity": text}, tmp_path, settings=SETTINGS)[1]
    assert (row["status"], row["stage"], row["error"]) == ("failed", "speed", "RuntimeError: no")
    assert row["quality"]["kl"]["value"] > 0 and "speed" not in row


def test_another_process_that_is_lost_is_no_failure_of_a_variant(tiny, text, tmp_path, monkeypatch):
    def gone(*_):
        raise RuntimeError("Gloo: connection closed by peer")

    compare(tiny, [], {"perplexity": text}, tmp_path, settings=SETTINGS)
    monkeypatch.setattr(compare_module, "lost", lambda error: "Gloo" in str(error))
    monkeypatch.setattr(compare_module.speed, "measure_speed", gone)
    with pytest.raises(RuntimeError, match="closed by peer"):
        compare(tiny, [INT8], {"perplexity": text}, tmp_path, settings=SETTINGS)
    assert [row["variant"] for row in read_results(tmp_path)] == ["baseline"]


def test_a_killed_run_goes_on(tiny, text, tmp_path, applied, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    data = {"perplexity": text}
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(compare_module.size, "measure_size", lambda *_: killed() if len(applied) > 1 else SIZE)
        SIZE = size.Size(1, 1.0, 1, None)
        compare(tiny, [INT8, INT4], data, tmp_path, settings=SETTINGS)
    assert [row["variant"] for row in read_results(tmp_path)] == ["baseline"]
    path = tmp_path / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"variant": "int8", "status": "o')  # and the kill came in the middle of a line
    applied.clear()
    monkeypatch.setattr(roofline, "machine", lambda dtype: 1 / 0)  # shares are of the limits that were found first
    rows = compare(tiny, [INT8, INT4], data, tmp_path, settings=SETTINGS)
    assert applied == [("int8",), ("int4:group=16",)] and path.read_bytes().startswith(whole)
    applied.clear()
    assert compare(tiny, [INT4, INT8], data, tmp_path, settings=SETTINGS) == [rows[0], rows[2], rows[1]]
    assert applied == [] and read_results(tmp_path) == rows


def test_an_interrupt_that_a_computation_turns_into_an_error_still_ends_the_run(tiny, text, tmp_path, monkeypatch):
    def torn(*_, **__):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RuntimeError("torn")  # noqa: B904

    monkeypatch.setattr(compare_module, "apply", torn)
    with pytest.raises(KeyboardInterrupt):
        compare(tiny, [INT8], {"perplexity": text}, tmp_path, settings=SETTINGS)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_failed_variant_is_tried_again(tiny, text, tmp_path, monkeypatch):
    data = {"perplexity": text}
    compare(tiny, [], data, tmp_path, settings=SETTINGS)
    real = compare_module.speed.measure_speed
    with monkeypatch.context() as m:
        m.setattr(compare_module.speed, "measure_speed", lambda *args: real(*args, batch=0))
        rows = compare(tiny, [INT8], data, tmp_path, settings=SETTINGS)
    assert rows[1]["error"] == "batch=0: must be 1 or more"
    rows = compare(tiny, [INT8], data, tmp_path, settings=SETTINGS)
    assert rows[1]["status"] == "ok" and read_results(tmp_path) == rows


def test_a_file_of_other_settings_is_refused(tiny, text, tmp_path):
    data = {"perplexity": text}
    compare(tiny, [], data, tmp_path, settings=SETTINGS)
    whole = (tmp_path / "results.jsonl").read_bytes()
    other = random_program(tiny_config(), seed=7)
    for changes, message in (
        ({"settings": dataclasses.replace(SETTINGS, window=16)}, "measured with window 32, now it is 16; give another"),
        ({"data": {"perplexity": text[:50]}}, 'measured with data {"perplexity": '),
        ({"program": other}, "measured with weights "),
        ({"settings": dataclasses.replace(SETTINGS, rounds=1, seed=1)}, r"rounds 2, now it is 1 \(and other seed\)"),
    ):
        options = {"program": tiny, "data": data, "settings": SETTINGS, **changes}
        with pytest.raises(InputError, match=message):
            compare(options["program"], [], options["data"], tmp_path, settings=options["settings"])
    compare(tiny, [INT8], data, tmp_path, settings=SETTINGS)
    with pytest.raises(InputError, match="'int8' is int8 there, now it is nf4; give it another name"):
        compare(tiny, [Variant("int8", ("nf4",))], data, tmp_path, settings=SETTINGS)
    assert (tmp_path / "results.jsonl").read_bytes().startswith(whole)


def test_a_baseline_that_fails_ends_the_run(tiny, text, tmp_path):
    long = dataclasses.replace(SETTINGS, prompt_tokens=600)
    with pytest.raises(InputError, match=r"the baseline failed, .*: a prompt of 600 tokens"):
        compare(tiny, [INT8], {"perplexity": text}, tmp_path, settings=long)


@pytest.mark.parametrize(
    "variants, data, message",
    [
        ([INT8, INT8], {"perplexity": [1, 2]}, "'int8': the name is given twice"),
        ([Variant("baseline", ("int8",))], {"perplexity": [1, 2]}, "the name is the unchanged model's"),
        ([Variant("a", ())], {"perplexity": [1, 2]}, "'a': has no passes"),
        ([Variant("a", ("int9",))], {"perplexity": [1, 2]}, "no pass 'int9': did you mean 'int8'"),
        ([Variant("a", ("int8:groop=3",))], {"perplexity": [1, 2]}, "int8 has no option 'groop'"),
        ([INT8], {}, "no data: give it for at least one of perplexity, lambada, hellaswag"),
        ([INT8], {"chess": []}, "no task 'chess'"),
    ],
)
def test_mistakes_are_told_before_any_work(tiny, tmp_path, variants, data, message):
    with pytest.raises(InputError, match=message):
        compare(tiny, variants, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_others_are_left_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    for content in (b"notes", b"notes\n", b"{}\n", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="line 1: not a row of a comparison, so the file is left alone"):
            Results(tmp_path, {})
        assert path.read_bytes() == content
    with pytest.raises(InputError, match=r"no such file; give the --out of a comparison that has run"):
        read_results(tmp_path / "absent")
    path.write_bytes(b"")
    with pytest.raises(InputError, match="has no rows yet"):
        read_results(tmp_path)


def test_numbers_that_json_has_not_become_null(tmp_path):
    row = Results(tmp_path, {"a": 1}).append({"variant": "x", "status": "ok", "value": [float("inf"), {"b": np.nan}]})
    assert row["value"] == [None, {"b": None}] and row["settings"] == {"a": 1}
    assert json.loads((tmp_path / "results.jsonl").read_text()) == row
