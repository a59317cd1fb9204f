"""What people see of a comparison: the table, its Markdown, the picture, and the command."""

import copy
import math
import struct

import pytest
from command import TINY, caller, lines_of, stories_path

from jaxinfer.errors import InputError
from jaxinfer.eval import plot as plot_module
from jaxinfer.eval import roofline
from jaxinfer.eval.plot import pareto_front, plot
from jaxinfer.eval.results import Results, Variant, read_results
from jaxinfer.eval.table import markdown, terminal

SETTINGS = {
    "model": "m", "dtype": "float32", "device": "2 cores of X", "data": {"perplexity": "a", "lambada": "b"},
    "window": 512, "max_tokens": 20000, "limit": 200, "prompt_tokens": 512, "decode_tokens": 64, "rounds": 5,
    "versions": {"jax": "0.1"},
}  # fmt: skip


def row(name, perplexity=20.0, error=0.001, accuracy=0.5, mb=100.0, kv=1000.0, prefill=1.0, decode=1.0, width=0.05):
    """Return a row, speeds given as ratios, `width` the half of their spread."""

    def mean(value, stderr):
        return {"value": value, "stderr": stderr}

    def rate(base, ratio):
        speeds = {"median": base * ratio, "p10": base * ratio * (1 - width), "p90": base * ratio * (1 + width)}
        return {**speeds, "ratio": ratio, "ratio_p10": ratio - width, "ratio_p90": ratio + width}

    extra = None if perplexity is None else math.log(perplexity / 20)
    return {
        "variant": name, "status": "ok", "passes": [name], "error": None,
        "quality": {
            "perplexity": mean(perplexity, 1.0), "kl": mean(0.0123, 0.001), "top1": mean(0.987, 0.01),
            "extra_nats": mean(extra, error), "lambada_acc": mean(accuracy, 0.03),
        },
        "size": {"weight_bytes": mb * 1e6, "kv_bytes_per_token": kv, "run_bytes": 2e8, "peak_bytes": None},
        "speed": {
            "prefill": rate(500, prefill), "decode": rate(40, decode), "first_token": rate(1.5, 1 / prefill),
        },
        "roofline": {"decode": 0.614, "prefill": 0.42}, "settings": SETTINGS,
    }  # fmt: skip


FAILED = {
    "variant": "int9", "status": "failed", "stage": "passes", "passes": ["int9"], "error": "no pass 'int9' | why",
    "settings": SETTINGS,
}  # fmt: skip
ROWS = [
    row("baseline"),
    row("int8", 20.4, mb=26.0, prefill=0.8, decode=1.5),
    row("lossless", 20.02, accuracy=0.41, kv=250.0, decode=0.97),
    row("collapsed", 9000.0, accuracy=0.4, mb=110.0),
    FAILED,
]


def cells(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(name)]
    return line.split()


def test_the_table_marks_what_is_worse_beyond_the_noise():
    text = terminal(ROWS)
    assert cells(text, "baseline") == [
        *("baseline", "20.00", "0.0123", "98.7", "50.0±3.0", "100.0", "1000", "200"),
        *("500±5%", "40.0±5%", "1500±5%", "61/42"),
    ]
    assert cells(text, "int8 ") == [
        *("int8", "20.40", "+2.00±0.10!", "0.0123", "98.7", "50.0±3.0", "26.0", "0.26x", "1000", "1.00x", "200"),
        *("400±5%", "0.80x!", "60.0±5%", "1.50x", "1875±5%", "61/42"),
    ]
    lossless = cells(text, "lossless")
    assert "+0.10±0.10" in lossless and "41.0±3.0!" in lossless  # 2 errors of a difference are 8.5 points
    assert "0.25x" in lossless and "0.97x" in lossless  # slower, but within the spread
    collapsed = cells(text, "collapsed")
    assert "x450!" in collapsed and "40.0±3.0!" in collapsed and "1.10x!" in collapsed
    assert "int9      failed (passes): no pass 'int9' | why" in text.splitlines()
    assert text.splitlines()[0].startswith("m (float32) on 2 cores of X; perplexity (windows of 512, first 20,000 ")


def test_the_table_fits_and_wraps():
    many = [
        *copy.deepcopy(ROWS),
        {**ROWS[1], "variant": "int4:group=128,symmetric=false kv_int4"},
        {**FAILED, "error": "word " * 90},
    ]
    for r in many[:4]:
        r["quality"]["hellaswag_acc_norm"] = r["quality"]["lambada_acc"]
    lines = terminal(many, width=150).splitlines()
    assert max(map(len, lines)) <= 160
    at = next(i for i, line in enumerate(lines) if line.startswith("int4:group=128"))
    assert not lines[at + 1].startswith(" ") and "+2.00" in lines[at]
    assert " ".join(lines).count("word") == 90


def test_columns_without_numbers_are_left_out():
    text = terminal([{**r, "quality": {"lambada_acc": r["quality"]["lambada_acc"]}} for r in ROWS[:2]])
    assert "lambada %" in text and "ppl" not in text.replace("ppl,", "") and "KL" not in text


def test_markdown_is_the_same_table():
    lines = markdown(ROWS).splitlines()
    header = next(line for line in lines if line.startswith("| variant"))
    body = [line for line in lines if line.startswith("| ") and line != header and not line.startswith("| ---")]
    assert all(line.count("|") == header.count("|") for line in body) and len(body) == 4
    assert "| 20.40 | +2.00±0.10! |" in body[1]
    assert "- int9: failed (passes): no pass 'int9' \\| why" in lines


@pytest.mark.parametrize(
    "points, more, front",
    [
        ([(1, 5), (2, 4), (3, 6), (2, 3)], (True, False), [3, 2]),
        ([(1, 5), (2, 4), (3, 6), (2, 3)], (False, False), [0, 3]),
        ([(1, 5), (2, 4), (3, 6), (2, 3)], (True, True), [2]),
        ([(1, 1), (1, 1)], (True, True), [0, 1]),
        ([(1, 1), (2, 1), (1, 2)], (True, True), [1, 2][::-1]),
        ([(1, 1), (1, 2)], (False, False), [0]),
    ],
)
def test_the_pareto_front_is_what_nothing_beats(points, more, front):
    assert pareto_front(points, more) == front


def test_the_picture_shows_every_measured_variant(tmp_path, monkeypatch):
    written = []
    real = plot_module._label
    monkeypatch.setattr(
        plot_module, "_label", lambda ax, points, names: written.append(names) or real(ax, points, names)
    )
    assert plot(ROWS, tmp_path / "p.png") == ["baseline", "int8", "lossless", "collapsed"]
    assert written == [["baseline", "int8", "lossless", "collapsed (perplexity 9000)"]] * 2
    data = (tmp_path / "p.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1200 and height > 700


def test_names_in_the_picture_do_not_overlap(tmp_path, monkeypatch):
    boxes = []
    real = plot_module._label

    def label(ax, points, names):
        real(ax, points, names)
        texts = [t for t in ax.texts if t.get_text()]
        boxes.append([t.get_window_extent() for t in texts])

    monkeypatch.setattr(plot_module, "_label", label)
    close = [row(f"variant {i}", 20 + 0.01 * i, decode=1 + 0.003 * i, mb=100 - 0.1 * i) for i in range(10)]
    plot([row("baseline"), *close], tmp_path / "p.png")
    for panel in boxes:
        assert len(panel) == 11
        assert not any(a.overlaps(b) for i, a in enumerate(panel) for b in panel[:i])


def test_accuracy_is_drawn_where_there_is_no_perplexity(tmp_path):
    rows = [{**r, "quality": {"lambada_acc": r["quality"]["lambada_acc"]}} for r in ROWS[:3]]
    assert plot(rows, tmp_path / "p.png") == ["baseline", "int8", "lossless"]
    with pytest.raises(InputError, match="nothing to draw"):
        plot([{**ROWS[0], "quality": {}}], tmp_path / "p.png")


@pytest.fixture
def cli(capsys, monkeypatch):
    monkeypatch.setattr(roofline, "machine", lambda dtype: roofline.Machine("machine", 1e9, 1e12, dtype, "published"))
    return caller(capsys)


def test_the_command_measures_prints_and_draws(cli, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 20)
    (tmp_path / "set").write_text("# two\n\neight = int8   # bits\nint8 int4:group=16\n")
    out = tmp_path / "out"
    argv = ["compare", "--config", TINY, "--pass-set", tmp_path / "set", "--pass", "int4:group=16", "--window", 64]
    argv += ["--data", f"perplexity={tmp_path / 'text.txt'}", "--max-tokens", 100, "--prompt-tokens", 16]
    argv += ["--decode-tokens", 4, "--rounds", 1, "--out", out]
    status, table, err = cli(*argv)
    assert status == 0 and err.splitlines()[-1] == f"{out / 'results.jsonl'} and {out / 'pareto.png'}"
    rows = lines_of(out / "results.jsonl")
    assert [r["variant"] for r in rows] == ["baseline", "int4:group=16", "eight", "int8 int4:group=16"]
    assert [r["status"] for r in rows] == ["ok", "ok", "ok", "failed"] and rows[0]["settings"]["max_tokens"] == 100
    assert rows[1]["command"].startswith("jaxinfer compare --config ") and "--pass int4:group=16" in rows[1]["command"]
    assert table == terminal(rows) + "\n" and (out / "pareto.png").stat().st_size > 10_000
    status, text, err = cli("compare", "--markdown", "--out", out)
    assert (status, text, err) == (0, markdown(rows) + "\n", "")
    assert "eight: measured already" in cli(*argv)[2] and lines_of(out / "results.jsonl")[:3] == rows[:3]


def test_files_are_found_in_a_folder(tmp_path, monkeypatch):
    import argparse

    from jaxinfer.cli.compare import _read_data

    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "valid.tokens").write_text("words")
    (tmp_path / "lambada").mkdir()
    (tmp_path / "lambada" / "test.jsonl").write_text('{"text": "a b c"}\n')
    args = argparse.Namespace(tasks="perplexity, lambada", data=[str(tmp_path)])
    assert _read_data(args) == {"perplexity": "words", "lambada": [{"text": "a b c"}]}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--out", "x"], "nothing to compare: give --pass, or --pass-set FILE"),
        (["--pass", "int8"], "the following arguments are required: --out"),
        (["--pass", "int9", "--out", "x"], "no pass 'int9': did you mean 'int8'"),
        (["--pass", "int8", "--rounds", "0", "--out", "x"], "--rounds=0: must be 1 or more"),
        (["--pass", "int8", "--tasks", "lambda", "--out", "x"], "no task 'lambda': did you mean 'lambada'?"),
        (["--pass", "int8", "--data", "absent", "--out", "x"], "--data absent: no such folder; give one, or TASK=FILE"),
        (["--pass", "int8", "--data", "perplexity=absent", "--out", "x"], "absent: no such file"),
        (["--pass-set", "absent", "--out", "x"], "absent: no such file"),
        (["--markdown", "--out", "absent"], "absent/results.jsonl: no such file"),
        (["m", "--markdown", "--out", "x"], "MODEL: --markdown measures nothing"),
        (["--markdown", "--pass", "int8", "--out", "x"], "--pass: --markdown measures nothing"),
        (["--pass", "int8", "--calibrate", TINY, "--out", "x"], "no pass here looks at text; leave it out"),
    ],
)
def test_mistakes_are_one_line(cli, tmp_path, monkeypatch, argv, message):
    (tmp_path / "text").write_text("text")
    if "--data" not in argv:
        argv = [*argv, "--data", f"perplexity={tmp_path / 'text'}"] if "--markdown" not in argv else argv
    status, out, err = cli("compare", *argv)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_a_bad_line_of_a_pass_set_is_told(tmp_path):
    from jaxinfer.cli.compare import read_pass_set

    (tmp_path / "set").write_text("a b = int8 kv_int8\nint4:group=64\n  w8a8 # c\n")
    assert read_pass_set(str(tmp_path / "set")) == [
        Variant("a b", ("int8", "kv_int8")), Variant("int4:group=64", ("int4:group=64",)), Variant("w8a8", ("w8a8",)),
    ]  # fmt: skip
    (tmp_path / "set").write_text("int8\nempty =  # none\n")
    with pytest.raises(InputError, match="set, line 2: 'empty =': must be name = pass pass"):
        read_pass_set(str(tmp_path / "set"))


def test_calibration_text_reaches_the_passes(cli, tmp_path):
    (tmp_path / "text").write_text("Once upon a time, there was a little girl named Lily. " * 40)
    argv = [
        "compare",
        stories_path(),
        "--dtype",
        "float32",
        "--pass",
        "mixed:group=43",
        "--calibrate",
        tmp_path / "text",
    ]
    argv += ["--data", f"perplexity={tmp_path / 'text'}", "--max-tokens", 100, "--prompt-tokens", 8]
    status, *_ = cli(*argv, "--decode-tokens", 4, "--rounds", 1, "--out", tmp_path / "out")
    base, mixed = read_results(tmp_path / "out")
    assert status == 0 and mixed["status"] == "ok" and mixed["settings"]["calibration"] is not None
    assert mixed["size"]["weight_bytes"] < 0.4 * base["size"]["weight_bytes"]


def test_results_are_read_in_the_order_of_measuring(tmp_path):
    results = Results(tmp_path, {})
    for r in ROWS:
        results.append({**r, "settings": {}})
    assert [r["variant"] for r in read_results(tmp_path)] == [r["variant"] for r in ROWS]
