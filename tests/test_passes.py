"""How passes are named, given options, applied, listed, saved and restored."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import TINY, caller
from models import random_program, tiny_config
from test_pass_laws import prefill

from jaxinfer import Calibration, apply, chain, load, save
from jaxinfer.configuration import check, defaults, from_config
from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.ops.quantized import Packed, QArray, is_quantized, nbytes
from jaxinfer.passes import PASSES, parse
from jaxinfer.passes.base import Calibrated
from jaxinfer.passes.quantization.int4 import Int4
from jaxinfer.passes.quantization.int8 import Int8
from jaxinfer.passes.quantization.mixed import Mixed
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicLinear
from jaxinfer.tree import leaves, select

SIZES = dict(embed_dim=64, mlp_dim=128, head_dim=16, windows=())


@pytest.fixture(scope="module")
def program():
    return random_program(tiny_config(**SIZES))


@pytest.fixture
def cli(capsys):
    return caller(capsys)


@pytest.fixture(scope="module")
def text(program):
    return Calibration.of(program, (np.arange(128) * 7 % 96).tolist(), window=32)


def test_a_spec_is_text_or_a_pair_or_a_pass():
    for spec in ("int4:group=32,symmetric=false", ("int4", {"group": 32, "symmetric": False})):
        assert parse(spec) == Int4(group=32, symmetric=False)
    assert parse(Int8()) == parse("int8") == Int8()
    assert parse("int4:where=.*q,symmetric=true").where == ".*q"
    assert parse("int4:where=a{1,2},group=16") == Int4(where="a{1,2}", group=16)  # a comma inside a pattern
    assert parse(("mixed", {"bits": 6})).bits == 6.0
    assert parse("mixed:plan=layers.0.mlp.down+layers.1.mlp.down").plan == ("layers.0.mlp.down", "layers.1.mlp.down")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int9", "no pass 'int9': did you mean 'int8' or 'int4'"),
        ("int4:grup=3", "int4 has no option 'grup': did you mean 'group'"),
        ("int4:group=x", "int4:group='x': must be int"),
        ("int4:group=2.5", "int4:group='2.5': must be int"),
        ("int4:symmetric=maybe", "int4:symmetric='maybe': must be bool"),
        ("int4:64", "'64' is not option=value"),
        (("int4", {"group": 2.5}), "int4:group=2.5: must be int"),
        (("int4", {"group": True}), "int4:group=True: must be int"),
        ("fp8:format=e3m4", "format='e3m4': did you mean"),
        ("mixed:bits=9", r"mixed:bits=9.0: must be in 4\.\.8"),
        ("int4:where=(", "where='\\('.*not a regular expression"),
    ],
)
def test_a_misspelt_spec_names_the_fix(program, spec, message):
    with pytest.raises(InputError, match=message):
        apply(program, spec)


def test_every_spec_is_read_before_any_work(program):
    calls = []
    with pytest.raises(InputError, match="no pass 'nope'"):
        apply(program, Spy(calls=calls), "nope")
    assert calls == []


class Spy(Int8):
    def __init__(self, calls):
        object.__setattr__(self, "calls", calls)

    def __call__(self, program):
        self.calls.append(program)
        return program


def test_three_ways_to_apply_are_one(program):
    by_name = apply(program, "int8", "kv_int8")
    by_chain = chain(parse("int8"), parse("kv_int8"))(program)
    by_step = apply(apply(program, "int8"), "kv_int8")
    for other in (by_chain, by_step):
        assert other.passes == by_name.passes
        assert jax.tree.structure(other.model) == jax.tree.structure(by_name.model)
        assert all(
            (a == b).all() for a, b in zip(jax.tree.leaves(other.model), jax.tree.leaves(by_name.model), strict=True)
        )


def test_where_and_skip_choose_the_kernels(program):
    out = apply(program, "int8:where=.*mlp.*,skip=.*down,embedding=false")
    kernels = {path: node.kernel for path, node in select(out.model, Linear).items()}
    for path, kernel in kernels.items():
        assert is_quantized(kernel) == ("mlp" in path and "down" not in path), path
    assert isinstance(out.model.embed.table, jax.Array)
    both = apply(program, "int8:where=.*attention.*", "int4:where=.*mlp.*")
    for path, node in select(both.model, Linear).items():
        assert isinstance(node.kernel, QArray if "attention" in path else Packed), path
    with pytest.raises(InputError, match=r"layers\.0\.attention\.qkv\.q: the kernels are quantized already"):
        apply(program, "int8:where=.*attention.*", "int4:where=.*")


@pytest.mark.parametrize(("options", "qtype"), [("symmetric=true", "int4"), ("symmetric=false", "uint4")])
def test_options_of_int4_matter(program, options, qtype):
    kernel = apply(program, f"int4:group=16,{options}").model.layers[0].mlp.down.kernel
    assert kernel.qtype == qtype and kernel.scale.shape == (64, 8)
    assert (kernel.offset is not None) == (qtype == "uint4")


@pytest.mark.parametrize("spec", ["int4", "nf4"])
def test_clipping_changes_the_scales(program, spec):
    plain, clipped = (apply(program, f"{spec}:clip={flag}").model for flag in ("false", "true"))
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(clipped), strict=True)
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_w8a8_puts_integer_products_in_place(program):
    model = apply(program, "w8a8").model
    assert all(type(n) is DynamicLinear for n in select(model, Linear).values())
    assert type(model.embed) is DynamicEmbedding
    hlo = jax.jit(lambda linear, x: linear(x)).lower(model.layers[0].mlp.down, jnp.ones((1, 4, 128))).as_text()
    assert "tensor<64x128xi8>" in hlo and "tensor<64x128xf32>" not in hlo


def test_kernels_are_packed_to_the_bytes_that_are_promised():
    program = random_program(tiny_config(embed_dim=128, mlp_dim=256, head_dim=32, windows=()))

    def kernels(program):
        return nbytes([node.kernel for node in select(program.model, Linear).values()])

    full = kernels(program)
    for spec, most in (
        ("int8", 0.30),
        ("fp8", 0.30),
        ("int4", 0.19),
        ("int4:group=32,symmetric=false", 0.19),
        ("nf4", 0.19),
    ):
        assert kernels(apply(program, spec)) <= most * full, spec


def test_mixed_precision_keeps_the_budget_and_beats_its_reverse(program, text):
    full = apply(program, "mixed:bits=6", calibration=text)
    plan = dict(full.passes)["mixed"]["plan"]
    sizes = {path: node.kernel.size for path, node in select(program.model, Linear).items()}
    assert 0 < sum(sizes[p] for p in plan) <= sum(sizes.values()) / 2
    for path, node in select(full.model, Linear).items():
        assert isinstance(node.kernel, QArray if path in plan else Packed), path
    reverse = apply(program, ("mixed", {"plan": tuple(set(sizes) - set(plan))}))
    base = prefill(program)
    error = [np.square(prefill(p) - base).mean() for p in (full, reverse)]
    assert error[0] < error[1]
    again = apply(program, ("mixed", {"plan": plan, "bits": 6.0}))  # a plan needs no text
    assert jax.tree.structure(again.model) == jax.tree.structure(full.model)
    assert Mixed(bits=4.0, calibration=text)(program).passes[0][1]["plan"] == ("none",)


@pytest.mark.parametrize("name", PASSES)
def test_a_saved_program_keeps_its_passes_and_loads_packed(program, text, name, tmp_path):
    before = apply(program, name, calibration=text)
    save(before, tmp_path / "saved")
    after = load(tmp_path / "saved")
    assert json.loads(json.dumps(after.passes)) == json.loads(json.dumps(before.passes))
    assert jax.tree.structure(after.model) == jax.tree.structure(before.model)
    assert nbytes(after.model) == nbytes(before.model)
    for path, leaf in leaves(before.model).items():
        restored = leaves(after.model)[path]
        assert restored.dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(restored), np.asarray(leaf), err_msg=path)
    np.testing.assert_array_equal(prefill(after), prefill(before))


def test_four_bits_take_four_bits_on_disk(tmp_path):
    program = apply(
        random_program(tiny_config(embed_dim=256, mlp_dim=512, head_dim=64, windows=(), vocab_size=64)), "int4"
    )
    path = save(program, tmp_path / "saved")
    stored = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    assert stored < 1.15 * nbytes(program.model) + 30_000  # and what Orbax writes beside the arrays


def test_a_saved_program_loads_in_another_dtype(program, tmp_path):
    save(apply(program, "int4"), tmp_path / "saved")
    half = load(tmp_path / "saved", dtype="bfloat16")
    kernel = half.model.layers[0].mlp.down.kernel
    assert kernel.dtype == kernel.scale.dtype == jnp.bfloat16 and kernel.values.dtype == jnp.uint8


def tiny(**changes):
    config = defaults()
    config.architecture = {
        "family": "llama", "vocab_size": 300, "embed_dim": 64, "mlp_dim": 128, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "max_context": 256,
    }  # fmt: skip
    for key, value in changes.items():
        config[key] = value
    return config


def test_a_config_lists_passes(tmp_path):
    config = tiny(passes=["kv_int8", ("int4", {"group": 32})])
    assert [name for name, _ in from_config(config).passes] == ["kv_int8", "int4"]
    assert dict(from_config(config).passes)["int4"]["group"] == 32
    words = tmp_path / "text.txt"
    words.write_text("some words to calibrate on " * 20)
    config = tiny(passes=["mixed"], calibration={"text": str(words), "windows": 2, "window": 64})
    assert dict(from_config(config).passes)["mixed"]["plan"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"passes": ["int9"]}, "no pass 'int9'"),
        ({"passes": [("int4",)]}, r"passes has \('int4',\): each must be"),
        ({"passes": ["mixed"]}, "mixed: needs text to calibrate on"),
        ({"calibration": {"windos": 3}}, r"unknown key 'calibration\.windos'"),
    ],
)
def test_a_config_with_wrong_passes_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        from_config(check(tiny(**changes)))


def test_text_that_no_pass_looks_at_is_refused(tmp_path):
    words = tmp_path / "text.txt"
    words.write_text("words")
    with pytest.raises(InputError, match="no pass here looks at text"):
        from_config(tiny(passes=["int8"], calibration={"text": str(words)}))


def test_the_list_of_passes_has_them_all(cli):
    out = cli("passes")[1]
    for name, kind in PASSES.items():
        assert name in out and kind.about.paper in out
    rows = [json.loads(line) for line in cli("passes", "--json")[1].splitlines()]
    assert [row["name"] for row in rows] == list(PASSES)
    calibrated = {name for name, kind in PASSES.items() if issubclass(kind, Calibrated)}
    assert {row["name"] for row in rows if row["calibrated"]} == calibrated
    assert "group=64" in cli("passes", "int4")[1]
    status, _, err = cli("passes", "int9")
    assert status == 2 and "no pass 'int9': did you mean 'int8' or 'int4'" in err


def test_the_readme_has_the_matrix_of_the_registry(cli):
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert cli("passes", "--matrix")[1].strip() in readme, "run `jaxinfer passes --matrix` and put it into README.md"


def test_the_command_applies_and_saves(cli, tmp_path):
    out = tmp_path / "out"
    status, said, _ = cli("apply", "--config", TINY, "--pass", "int4:group=32", "--pass", "kv_int8", "--out", out)
    assert status == 0 and "int4 + kv_int8" in said and "MB on disk" in said
    assert [name for name, _ in load(out).passes] == ["int4", "kv_int8"]
    info = json.loads(cli("info", out, "--json")[1])
    assert info["passes"] == ["int4", "kv_int8"] and info["bytes_in_memory"]["uint8"] > 0
    plain = json.loads(cli("info", "--config", TINY, "--json")[1])
    told = json.loads(cli("info", "--config", TINY, "--pass", "kv_int8", "--json")[1])
    assert told["kv_bytes_per_token"] < 0.6 * plain["kv_bytes_per_token"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "x"], "no passes to apply: give --pass NAME"),
        (["--pass", "int9", "--out", "x"], "no pass 'int9'"),
        (["--pass", "int8", "--out", "."], "--out .: exists"),
        (["--pass", "int8", "--calibration-windows", "2", "--out", "x"], "need a text: give --calibrate FILE"),
    ],
)
def test_wrong_commands_are_one_line(cli, args, message):
    status, _, err = cli("apply", "--config", TINY, *args)
    assert status == 2 and message in err and len(err.strip().splitlines()) == 1
