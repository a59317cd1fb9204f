"""The script behind the survey's Table 4, on a model of random weights."""

import importlib.util
import json

import pytest
from command import ROOT, TINY

from jaxinfer.errors import InputError


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("survey_table4", ROOT / "scripts" / "survey_table4.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_prints_lines_and_a_table_a_variant(script, capsys):
    sizes = ["--batches", "1,2", "--lengths", "8,16", "--new-tokens", "5", "--rounds", "1"]
    script.main(["--config", TINY, "--passes", "int4:group=16", "int8", *sizes])
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [(x["batch"], x["length"], x["variant"]) for x in lines[:4]] == [
        (1, 8, "int4:group=16"), (1, 8, "int8"), (1, 16, "int4:group=16"), (1, 16, "int8"),
    ]  # fmt: skip
    assert len(lines) == 8 and lines[0]["dtype"] == "float32" and lines[0]["rounds"] == 1
    assert all(0 < x[case]["ratio"] < float("inf") for x in lines for case in script.CASES)
    ratios = {(x["variant"], x["batch"], x["length"]): [x[case]["ratio"] for case in script.CASES] for x in lines}
    for spec in ("int4:group=16", "int8"):
        block = out[out.index(f"\n{spec}: speed-up") + 1 :].splitlines()[1:4]
        assert block[0].split() == ["B", "8", "16"]
        for batch, line in zip((1, 2), block[1:], strict=True):
            want = ["/".join(f"{r:.2f}" for r in ratios[spec, batch, length]) for length in (8, 16)]
            assert line.split() == [str(batch), *want]


def test_a_cell_that_fails_says_so(script, capsys, monkeypatch):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(script.speed, "measure_speed", full)
    script.main(["--config", TINY, "--passes", "int8", "--batches", "1", "--lengths", "8"])
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[0])["error"] == "RuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    assert out.splitlines()[-1].split() == ["1", "OOM"]
    monkeypatch.setattr(script.speed, "measure_speed", lambda *_: 1 / 0)
    script.main(["--config", TINY, "--passes", "int8", "--batches", "1", "--lengths", "8"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "failed"]
    with pytest.raises(InputError, match="no pass 'int9': did you mean 'int8'"):
        script.main(["--config", TINY, "--passes", "int9"])
