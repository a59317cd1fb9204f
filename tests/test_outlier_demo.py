"""Outlier channels: put in without changing the model, they ruin rounding to nearest and not what was made for them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from channels import logits
from data import data_dir

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "outlier_demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("outlier_demo", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_injection_leaves_the_logits(demo, stories):
    uneven = demo.inject(stories, 100.0, 4, ("qkv", "gate_up", "down"))
    tokens = np.arange(48).reshape(2, 24) * 7 % stories.config.vocab_size
    before = logits(stories, tokens)
    np.testing.assert_allclose(logits(uneven, tokens), before, atol=1e-5 * np.abs(before).max())
    gains = np.asarray(uneven.model.layers[0].mlp_norm.scale / stories.model.layers[0].mlp_norm.scale)
    assert sorted(gains.round(3).tolist())[-5:] == pytest.approx([1, 100, 100, 100, 100])


def test_the_table_shows_who_holds(demo, stories, monkeypatch, capsys):
    variants = (("w8a8",), ("smoothquant",), ("llm_int8",), ("quarot", "w8a8"), ("int4",), ("awq",), ("quarot", "int4"))
    monkeypatch.setattr(demo, "VARIANTS", variants)
    data = data_dir()
    argv = [str(data / "models" / "stories260K"), "--text", str(data / "tinystories" / "dev.txt.xz")]
    argv += ["--calibrate", str(data / "tinyshakespeare" / "input.txt.xz"), "--tokens", "1024", "--windows", "2"]
    assert demo.main([*argv, "--window", "256", "--channels", "4"]) == 0
    lines = [line.strip("| \n").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    table = {name: (float(without), float(having)) for name, without, having in lines[2:]}
    exact = table["none"][0]
    assert table["none"][1] == pytest.approx(exact, rel=1e-3)
    assert table["w8a8"][0] < 1.02 * exact and table["w8a8"][1] > 1.5 * exact
    for name in ("smoothquant", "llm_int8", "quarot + w8a8"):
        assert table[name][1] < 1.05 * exact, (name, table)
    damage = table["int4"][1] - exact
    for name in ("awq", "quarot + int4"):
        assert table[name][1] - exact < 0.3 * damage, (name, table)
