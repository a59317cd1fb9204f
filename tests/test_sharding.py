"""Meshes, rules, what they refuse; and every pass, cache and decoder on eight devices against one."""

import json
import re

import jax
import numpy as np
import pytest
from command import TINY, process
from jax.sharding import AbstractMesh, PartitionSpec
from mesh_laws import FORMS, WHOLE
from meshes import lines
from models import random_model, tiny_config, tiny_moe
from tpu import lines as tpu_lines
from tpu import needs_libtpu

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import abstract
from jaxinfer.passes import PASSES, apply
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.program import Program
from jaxinfer.sharding.fitting import check_fits, fit, unfit
from jaxinfer.sharding.mesh import make_mesh, parse_mesh
from jaxinfer.sharding.rules import RULES
from jaxinfer.sharding.specs import cache_shardings, model_shardings
from jaxinfer.tree import leaves

NAMES = ["none", *PASSES, *FORMS]
HALVES = (NAMES[::2], NAMES[1::2])


def mesh_of(text: str) -> AbstractMesh:
    sizes = parse_mesh(text)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data4", "is not axis=size"),
        ("date=3", "no axis 'date'; did you mean 'data'"),
        ("data=0", "data=0 must be a whole number"),
        ("data=2,data=2", "data is there twice"),
        ("data=2,model=3", "takes 6 devices, and there are 1; data=1,model=1 fits"),
    ],
)
def test_a_mesh_that_is_none_is_refused(text, said):
    with pytest.raises(InputError, match=said):
        make_mesh(parse_mesh(text), jax.devices()[:1])


@pytest.mark.parametrize(
    ("mesh", "rules", "changes", "said"),
    [
        ("model=8", "mixed", {}, r"mesh model=8: heads=4 \(query heads\) is not divided by model=8.*=2,model=4 fits"),
        ("data=2,model=4", "tensor", {"mlp_dim": 50}, r"mlp=50 \(the width of the mlp\).*data=4,model=2 fits"),
        ("expert=8", "mixed", {"moe": tiny_moe(num_experts=6, layers=None), "num_heads": 8}, "=6 .*data=4,expert=2"),
    ],
)  # fmt: skip
def test_what_a_mesh_does_not_divide_is_refused_with_one_that_fits(mesh, rules, changes, said):
    model = abstract(tiny_config(**changes))
    with pytest.raises(InputError, match=said) as refused:
        fit(model, mesh_of(mesh), RULES[rules])
    fits = str(refused.value).split("; ")[-1].removesuffix(" fits")
    check_fits(fit(model, mesh_of(fits), RULES[rules]), mesh_of(fits), RULES[rules])


def test_a_model_is_made_to_fit_and_back():
    """Fused projections are taken apart; too few key heads are repeated, so that each query still reads its own."""
    model = random_model(tiny_config(num_heads=8, qkv_bias=True))
    fused = apply_layouts(model, ("fused", "long_last"))
    with pytest.raises(InputError, match="fused"):
        model_shardings(fused, mesh_of("model=8"), RULES["mixed"])
    fitted = fit(fused, mesh_of("model=8"), RULES["mixed"])
    assert fitted.layers[0].attention.num_kv_heads == 8
    ids = (np.arange(40) % 96).reshape(2, 20).astype(np.int32)
    np.testing.assert_allclose(ji.logits(Program(fitted), ids), ji.logits(Program(model), ids), rtol=1e-4, atol=1e-4)
    for path, leaf in leaves(unfit(fit(model, mesh_of("model=8"), RULES["mixed"]))).items():
        np.testing.assert_array_equal(leaf, leaves(model)[path])


def test_packed_values_are_divided_by_whole_runs_and_scales_where_they_are_several():
    config = tiny_config(embed_dim=64, mlp_dim=128, num_heads=8, num_kv_heads=4)
    model = apply(Program(abstract(config)), "int4:group=32").model
    found = {
        path: s.spec for path, s in leaves(model_shardings(model, mesh_of("fsdp=2,model=4"), RULES["mixed"])).items()
    }
    P, layer = PartitionSpec, "layers.0."
    assert found[layer + "attention.qkv.q.kernel.values"] == P("model", None, "fsdp")
    assert found[layer + "attention.qkv.q.kernel.scale"] == P("model", None, "fsdp")
    assert found[layer + "attention.o.kernel.values"] == P("fsdp", "model")  # [D, N, H / 2]
    assert found[layer + "mlp.down.kernel.values"] == P("fsdp", "model")  # four runs of 32
    assert found[layer + "mlp.down.kernel.scale"] == P("fsdp", "model")
    assert found["embed.table.scale"] == P("model")
    assert found["final_norm.scale"] == P()
    whole = leaves(model_shardings(model, mesh_of("model=8,data=2"), RULES["data"]))
    assert {s.spec for s in whole.values()} == {P()}
    odd = abstract(tiny_config(vocab_size=97))  # a table that is not divided lies whole
    assert leaves(model_shardings(odd, mesh_of("model=2"), RULES["tensor"]))["embed.table"].spec == P()


@pytest.mark.parametrize("name", ["kv_paged:store=int4", *(n for n in PASSES if n.startswith("kv_"))])
def test_every_array_of_a_cache_is_divided_by_rows_and_heads(name):
    model = apply(Program(abstract(tiny_config())), name).model
    cache = jax.eval_shape(lambda: model.init_cache(4, 256))
    specs = {s.spec for s in leaves(cache_shardings(cache, mesh_of("data=4,model=2"), RULES["tensor"])).values()}
    pair = (None,) if "int4" in name and "paged" in name else ()  # of keys and values, side by side
    assert {PartitionSpec("data"), PartitionSpec("data", *pair, "model")} <= specs
    assert specs <= {PartitionSpec("data"), *(PartitionSpec("data", *more, "model") for more in ((), pair))}
    few = jax.eval_shape(lambda: model.init_cache(1, 256))  # one row is not divided: every device has it
    specs = {s.spec for s in leaves(cache_shardings(few, mesh_of("data=4,model=2"), RULES["tensor"])).values()}
    assert {tuple(spec) for spec in specs} <= {(), (None, "model"), (None, *pair, "model")}


def check_law(line: dict) -> None:
    """Assert the logits of one device, and that each of eight has its part of the weights and of the cache."""
    rounds = line["name"] in PASSES and PASSES[line["name"]].about.rounds_activations
    few = line["name"] in ("kv_int8", "kv_int4")  # of whose roundings none is so close here that a last bit decides
    assert line["largest"] < (0.05 if rounds and not few else 1e-4), line
    assert line["median"] < 1e-5, line  # where activations are rounded a last bit decides over a step now and then
    rows_heads_slots = {
        "data=2,model=4": 2 * 4,
        "fsdp=8": 1,
        "fsdp=2,model=4": 2 * 4,
        "context=2,fsdp=2,model=2": 2 * 2 * 2,
        "context=4,model=2": 2 * 4,
        "data=2,expert=4": 2 * 4,
        "expert=2,model=4": 8,
        "context=2,expert=4": 4 * 2,
        "context=2,model=4": 4 * 2,
        "data=2,fsdp=2,model=2": 4,  # rules fully_sharded: four rows, and heads are whole
        "data=2,context=2,model=2": 2 * 2 * 2,  # rules data: four rows over data and model
    }
    assert line["cache_bytes"] == line["cache_device_bytes"] * rows_heads_slots[line["mesh"]], line
    assert line["device_bytes"] < line["bytes"] or line["rules"] == "data", line


@pytest.mark.parametrize("names", HALVES, ids=["even", "odd"])
def test_every_pass_and_cache_gives_on_every_mesh_what_one_device_gives(names):
    found = lines("mesh_laws.py", *names)
    assert {(line["name"], line["mesh"]) for line in found if line["kind"] == "dense"} == {
        (name, mesh)
        for name in names
        for mesh in ("data=2,model=4", "fsdp=8", "fsdp=2,model=4", "context=2,fsdp=2,model=2", "context=4,model=2")
        if name not in WHOLE or "context" not in mesh
        if name in ("none", "kv_int8", "kv_fp8") or mesh != "context=4,model=2"
    }
    for line in found:
        check_law(line)


def test_every_table_of_rules_gives_what_one_device_gives():
    found = {(line["rules"], line["kind"]): line for line in lines("mesh_laws.py", "tables")}
    assert {rules for rules, _ in found} == set(RULES)
    for line in found.values():
        check_law(line)
    assert all(path.endswith("bias") for path in found["fully_sharded", "dense"]["whole"])  # of no embed axis
    assert found["data", "dense"]["device_bytes"] == found["data", "dense"]["bytes"]
    assert found["expert", "experts"]["device_bytes"] < found["expert", "experts"]["bytes"] / 4


def test_every_decoder_gives_on_every_mesh_the_tokens_of_one_device():
    *found, last = lines("mesh_laws.py", "decoders")
    paged = {"kv_paged", "kv_paged lookahead", "kv_paged_int4 ngram"}
    assert {line["decoder"] for line in found} == {"greedy", "sampled", "ngram", "lookahead", "draft", *paged}
    assert len(found) == 17 + 3
    assert all(line["same"] for line in found), found
    np.testing.assert_allclose(last["perplexity"][1], last["perplexity"][0], rtol=1e-5)


def test_checkpoints_go_straight_to_their_shards_and_from_mesh_to_mesh(tmp_path):
    """No device has a whole tensor, and the process, which here is all eight, has the model once and little more."""
    (line,) = lines("mesh_files.py", str(tmp_path))
    memory, saved = line["memory"], line["saved"]
    assert memory["parts"] == [8.0] and memory["rise"] < 1.3 * memory["bytes"], memory
    assert saved["same"] == [True] * 3 and saved["largest"] < 1e-4 and saved["devices"] == 8, saved
    assert saved["heads"] == [4, 1, 2]


def test_the_command_line_runs_on_a_mesh_of_simulated_devices():
    common = ("generate", "Hello", "--config", TINY, "--max-new-tokens", 8, "--pass", "kv_int8")
    meshes = (), ("--mesh", "data=2,model=4"), ("--mesh", "context=4,model=2")
    runs = [process(*common, *more) for more in meshes]
    (alone, _), *others = (run.communicate(timeout=300) for run in runs)
    for run, (many, told) in zip(runs[1:], others, strict=True):
        assert alone == many and run.returncode == 0 and len(told.splitlines()) == 1
    refused = process(*common[:-1], "kv_int4", "--mesh", "context=4,model=2")
    _, told = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "kv_int4" in told and "without context data=4,model=2 fits" in told
    refused = process("eval", "--task", "perplexity", "--data", TINY, "--config", TINY, "--mesh", "model=16")
    _, told = refused.communicate(timeout=300)
    assert refused.returncode == 2 and "mesh model=16: heads=8 (query heads) is not divided by model=16" in told
    assert "data=2,model=8 fits" in told


@needs_libtpu
def test_programs_for_four_tpus_call_kernels_and_never_gather_a_cache():
    found = {line["program"]: line for line in tpu_lines("tests/tpu_meshes.py")}
    calls = {name: set(line["kernels"]) for name, line in found.items()}
    assert calls == {
        "decode": {"decode_attention"},
        "decode_int8_kv_int8": {"decode_attention", "quantized_matmul"},
        "decode_int4_kv_int4": {"kivi_attention", "quantized_matmul"},
        "decode_w8a8": {"decode_attention", "quantized_matmul"},
        "decode_kv_paged": {"paged_decode_attention"},
        "decode_kv_paged_int4": {"paged_kivi_attention"},
        "prefill": {"prefill_attention"},
        "context_decode": {"decode_attention"},
        "context_decode_int8_kv_int8": {"decode_attention", "quantized_matmul"},
        "context_prefill": {"prefill_attention"},
        "stage_decode_int8_kv_int8": {"decode_attention", "quantized_matmul"},
        "stage_decode_kv_paged": {"paged_decode_attention"},
        "stage_prefill": {"prefill_attention"},
    }
    for name, line in found.items():
        # Two sums a layer, one of the embedding; tokens and their scores are exchanged, and no array of a cache.
        # Of a divided context parts are merged, or queries go round, and new keys and values to their slots. Hidden
        # states go from stage to stage.
        passed_on = name == "context_prefill" or name.startswith("stage")
        kinds = {"all-gather", "all-reduce", *(("collective-permute",) if passed_on else ())}
        assert "collective-permute" in line["moved"] or not passed_on, line
        assert set(line["moved"]) <= kinds and "all-reduce" in line["moved"], line
        assert set(line["moved"]) == kinds or name != "context_prefill", line
        most = 4 * 64 * 128 if name == "context_prefill" else 1024
        gathered = [
            int(np.prod(json.loads(dims)))
            for shape in line["moved"].get("all-gather", [])
            for dims in re.findall(r"\[[\d,]+\]", shape)
        ]
        assert max(gathered, default=0) <= most, line
