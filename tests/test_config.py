"""Configs: the committed ones run, and mistakes name the nearest key."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import jaxinfer as ji
from jaxinfer import configuration
from jaxinfer.errors import InputError
from jaxinfer.text.bytes import byte_tokenizer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SIZES = dict(vocab_size=96, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)


def write(tmp_path, body: str) -> str:
    path = tmp_path / "config.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        "from ml_collections import ConfigDict\nfrom jaxinfer.configuration import defaults\n"
        f"def get_config(argument=None):\n    config = defaults()\n{lines}\n    return config\n"
    )
    return str(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.name)
def test_every_config_is_read_and_says_what_it_is_for(path):
    config = configuration.read_config(str(path))
    assert set(config) == set(configuration.defaults())
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert all(word in doc for word in ("Purpose:", "Command:", "Expect:"))


def test_the_tiny_config_runs_end_to_end():
    config = configuration.read_config(str(CONFIGS / "tiny.py"))
    program = configuration.from_config(config)
    doc = (CONFIGS / "tiny.py").read_text()
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(program.model)):,} parameters" in doc
    assert f"context {program.config.max_context}" in doc
    text = ji.generate_text(program, "Hello", max_new_tokens=8)
    assert text and text == ji.generate_text(program, ["Hello", "Bye"], max_new_tokens=8)[0]


def test_a_config_file_takes_an_argument(tmp_path):
    spec = write(tmp_path, "config.generate.seed = int(argument or 0)")
    assert configuration.read_config(f"{spec}:7").generate.seed == 7
    assert configuration.read_config(str(CONFIGS / "smollm2.py") + ":sampled").generate.top_p == 0.9


@pytest.mark.parametrize(
    "body, message",
    [
        ("config.modle = 'x'", "unknown key 'modle': did you mean 'model'"),
        ("config.generate.temprature = 1.0", "unknown key 'generate.temprature': did you mean 'temperature'"),
        ("config.architecture = {'num_layer': 2}", "unknown key 'architecture.num_layer': did you mean 'num_layers'"),
        ("config.architecture = {'vocab_size': 2}", "architecture has no family, embed_dim, .*needs them"),
        (
            "config.architecture = {'rope': {'thetta': 2}}",
            "unknown key 'architecture.rope.thetta': .*'theta'",
        ),
        ("config.dtype = 'bfloat'", "dtype='bfloat': did you mean 'bfloat16'"),
        ("config = ConfigDict({'generate': {'top_k': 1.5}})", "generate.top_k=1.5: must be int"),
        ("config = ConfigDict({'generate': {'stop': 'x'}})", "generate.stop='x': must be a list of strings"),
        ("config = ConfigDict({'generate': 3})", "generate=3: must be a dictionary"),
        ("config = ConfigDict({'model': None})", "model=None: must be str"),
        ("config = {}", "returned a dict, not an ml_collections.ConfigDict"),
        ("config.generate.seed = 1 / 0", "ZeroDivisionError"),
    ],
)
def test_mistakes_are_named(tmp_path, body, message):
    with pytest.raises(InputError, match=message):
        configuration.read_config(write(tmp_path, body))


def test_files_that_are_no_configs_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        configuration.read_config("absent.py")
    (tmp_path / "a.py").write_text("x = 1")
    with pytest.raises(InputError, match="no function get_config"):
        configuration.read_config(str(tmp_path / "a.py"))
    (tmp_path / "b.py").write_text("def get_config(:")
    with pytest.raises(InputError, match="SyntaxError"):
        configuration.read_config(str(tmp_path / "b.py"))


def test_an_architecture_may_have_every_part():
    config = configuration.defaults()
    config.architecture = {
        **SIZES, "family": "mixtral", "max_context": 64, "windows": (16, None), "rope": {"theta": 5e5},
        "moe": {"num_experts": 4, "experts_per_token": 2, "expert_dim": 8},
    }  # fmt: skip
    program = configuration.from_config(config)
    assert program.config.moe.layers is None and program.config.rope.theta == 5e5
    assert program.tokenizer is None  # 96 tokens can't hold the bytes
    assert ji.logits(program, np.array([[1, 2, 3]])).shape == (1, 3, 96)


def test_values_that_a_config_leaves_out_are_the_defaults():
    config = configuration.check(ConfigDict({"model": "x", "generate": {"temperature": 1}}))
    assert config.generate.temperature == 1.0 and config.generate.max_new_tokens == 128 and config.dtype is None


@pytest.mark.parametrize("text", ["plain", "é 漢字 🎈", "\x00\n\t ", ""])
def test_the_byte_tokenizer_gives_back_what_it_reads(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
