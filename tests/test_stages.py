"""Layers in stages: which meshes take them, and programs on eight devices against one."""

import pytest
from command import TINY, process
from meshes import lines
from models import tiny_config, tiny_moe
from test_sharding import mesh_of

from jaxinfer.errors import InputError
from jaxinfer.models.transformer import abstract
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.sharding.fitting import check_fits, fit
from jaxinfer.sharding.rules import RULES
from jaxinfer.sharding.stages import pieces_of


@pytest.mark.parametrize(
    ("mesh", "changes", "said", "fits"),
    [
        (
            "stage=4",
            {"windows": (), "num_layers": 6},
            r"mesh stage=4: layers=6 .* not divided by stage=4 .*; ",
            "data=2,stage=2",
        ),
        ("stage=2,model=2", {}, r"layers 0 and 1, which have one place in two of stage=2, are not", "stage=1,model=4"),
        ("data=2,stage=2", {"windows": (), "moe": tiny_moe()}, "layers 0 and 1, .* not of one kind", "data=4,stage=1"),
        ("stage=2,model=4", {"windows": (), "num_heads": 6}, r"heads=6 \(query heads\)", "data=2,stage=2,model=2"),
    ],
)
@pytest.mark.parametrize("rules", ["mixed", "tensor"])
def test_layers_that_stages_can_not_have_are_refused_with_a_mesh_that_fits(mesh, changes, said, fits, rules):
    model = abstract(tiny_config(**changes))
    with pytest.raises(InputError, match=said) as refused:
        check_fits(model, mesh_of(mesh), RULES[rules])
    found = str(refused.value).split("; ")[-1].removesuffix(" fits")
    assert found == fits
    fit(model, mesh_of(found), RULES[rules])


def test_layers_that_a_pass_made_unlike_are_refused():
    model = apply(Program(abstract(tiny_config(windows=()))), ("int8", {"where": r"layers\.1\..*"})).model
    with pytest.raises(InputError, match=r"layers 0 and 1, .* or passes"):
        check_fits(model, mesh_of("stage=2"), RULES["mixed"])
    windows = abstract(tiny_config(num_layers=4, windows=(24, None, 24, None)))  # of one kind at each place
    check_fits(windows, mesh_of("stage=2"), RULES["mixed"])


@pytest.mark.parametrize(
    ("rows", "tokens", "mesh", "pieces"),
    [
        (1, 1, "stage=4", 1),
        (64, 1, "stage=4", 1),  # a step of any number of rows: its tokens are one a row
        (1, 511, "stage=4", 1),
        (1, 512, "stage=4", 2),
        (2, 512, "stage=4,data=2", 2),
        (8, 1024, "stage=2", 8),  # at most four for each stage
        (1, 768, "stage=4", 2),
        (64, 16, "stage=2,context=2", 1),  # or a device's tokens of the context would be too few
        (64, 64, "stage=2,context=2", 4),
    ],
)
def test_prompts_are_cut_where_computing_dominates(rows, tokens, mesh, pieces):
    sizes = dict(mesh_of(mesh).shape)
    assert pieces_of(rows, tokens, sizes, RULES["mixed"], chain=True) == pieces
    assert pieces_of(rows, tokens, sizes, RULES["mixed"], chain=False) == 1


def test_every_pass_cache_and_table_of_rules_gives_in_stages_what_one_device_gives():
    found = lines("mesh_stages.py", "laws")
    assert len(found) == 23 and {line["rules"] for line in found} == {"mixed", "fully_sharded", "data", "expert"}
    caches = {"kv_int8", "kv_fp8", "kv_int4", "kv_window", "kv_paged", "kv_paged_int4"}
    assert {line["name"] for line in found} == {"none", *caches, "int8", "w8a8", "quarot", "int4"}
    for line in found:
        rounds = "same_mesh" in line
        assert rounds == (line["name"] in ("kv_fp8", "kv_int4", "kv_paged_int4", "w8a8")), line
        assert line["largest"] < (0.05 if rounds else 1e-4) and line["median"] < 1e-5, line
        assert line.get("same_mesh", 0) < 1e-6, line  # nothing is rounded that is not without stages
        assert line["cache_bytes"] == 8 * line["cache_device_bytes"], line
        assert line["device_bytes"] < line["bytes"] / (1.7 if line["rules"] == "data" else 3), line


def test_prompts_in_pieces_give_what_one_device_gives():
    found = lines("mesh_stages.py", "prompts")
    assert len(found) == 4 and [line["pieces"] for line in found] == [4, 4, 2, 4]
    for line in found:
        assert max(line["largest"]) < 1e-4, line


def test_every_decoder_and_session_gives_in_stages_the_tokens_of_one_device():
    found = lines("mesh_stages.py", "decoders")
    assert len(found) == 11 and all(line["same"] for line in found), found
    assert len({token for rows in found[-1]["tokens"] for row in rows for token in row}) > 8


def test_a_device_holds_the_layers_of_its_stage_and_nothing_of_them_is_moved():
    held, *steps = lines("mesh_stages.py", "held")
    assert held["nodes"] == 2 and len(held["whose"]) == 2 * 8 and all(held["whose"]), held
    assert (held["matrices"], held["norms"], held["cache"]) == ([4], [2], [8]), held  # model=2 and data=2 divide, too
    assert len(steps) == 3
    for line in steps:
        kinds = {kind for kind, *_ in line["moved"]}
        assert "collective-permute" in kinds and kinds <= {"collective-permute", "all-reduce"}, line
        if line["tokens"] == 1:
            assert max(size for _, size, _ in line["moved"]) < min(line["matrix"], line["cache_array"]) / 2, line
            assert line["beside"] < line["cache_array"] / 2, line  # no copy of a cache


def test_passes_of_a_program_in_stages_give_what_they_give_on_one_device():
    found = lines("mesh_stages.py", "passes")
    assert [line["passes"] for line in found] == [["int8"], ["quarot"], ["awq"], ["kv_int8"]]
    for line in found:
        assert line["stages"] == 2 and line["largest"] < 1e-4, line


def test_checkpoints_go_to_their_stages_and_from_stages_to_any_mesh(tmp_path):
    (line,) = lines("mesh_stages.py", str(tmp_path))
    assert line["same"] == [True] * 5 and line["stages"] == [2, 1, 1, 2, 2, 2] and line["largest"] < 1e-4, line
    assert line["read_to"] == [4, 8] and line["parts"] == [4.0], line  # a layer to its stage, the embedding to all


def test_what_needs_some_of_the_layers_is_refused():
    said = {line["refused"]: line["said"] for line in lines("mesh_stages.py", "refusals")}
    mesh = "mesh data=2,stage=2,model=2: "
    assert said["exit"].startswith(mesh + "stage=2 runs all layers, and a drafter or pass asks for the output of some")
    assert said["direct"] == "int8: the layers are in stages; use apply, which takes them out, or shard last"
    for name, kind in {"early_exit": "EarlyExit", "skip_decode": "ByPosition"}.items():
        assert said[name].startswith(mesh + f"{kind} decides which layers run, and stage=2 divides them in order")
        assert said[name].endswith("; without stage data=4,model=2 fits")
    assert said["skip_layers"].startswith(mesh + "layers=3 (each stage has as many) is not divided by stage=2")
    assert len(said) == 5 and all(len(text.splitlines()) == 1 for text in said.values())


def test_the_command_line_runs_in_stages_on_simulated_devices():
    common = ("generate", "Hello", "--config", TINY, "--max-new-tokens", 8, "--pass", "int8")
    runs = [process(*common, *more) for more in ((), ("--mesh", "stage=2,model=2"))]
    (alone, _), (many, told) = (run.communicate(timeout=300) for run in runs)
    assert alone == many and runs[1].returncode == 0, told
