"""The cost model beyond what is compiled: choosing a mesh, growing machines, and the scripts around both."""

import dataclasses
import json

import plan_accuracy
import plan_matrix
import pytest
from command import ROOT
from test_plan import hf_config

from jaxinfer.errors import InputError
from jaxinfer.plan import choice, scaling, sweep
from jaxinfer.plan.planning import plan, tokens_per_second
from jaxinfer.plan.request import Request


def wide(folder) -> Request:
    """Return a request for two layers of a wide model, 8 GB of them."""
    sizes = dict(hidden_size=8192, intermediate_size=65_536, num_hidden_layers=2, num_attention_heads=64)
    sizes |= dict(num_key_value_heads=8, head_dim=128, max_position_embeddings=8192)
    (folder / "config.json").write_text(json.dumps(hf_config(**sizes)))
    return Request(model=str(folder), topology="v5p:4x4x4", batch=1024, context=2048, phases=("decode",))


def test_the_mesh_that_is_chosen_is_the_best_of_those_that_fit(tmp_path):
    asked = dataclasses.replace(wide(tmp_path), topology="v5e:2x4")
    chosen = choice.best(asked, most_rows=16)
    rates = {}
    for ways in (1, 2, 4, 8):
        mesh = f"data={8 // ways},model={ways}" if ways < 8 else "model=8"
        found = plan(dataclasses.replace(asked, mesh=mesh, rules="tensor", batch=16 * 8 // ways), compiling=False)
        if found.memory.total <= 0.9 * found.memory.usable:
            rates[mesh] = tokens_per_second(found)
    assert chosen.mesh == max(rates, key=rates.get)
    assert choice.best(dataclasses.replace(asked, topology="v5e:1x1")) is None or chosen.batch >= 16


def test_stages_are_chosen_where_dividing_further_repeats_key_heads(tmp_path):
    sizes = dict(hidden_size=8192, intermediate_size=65_536, num_hidden_layers=8, num_attention_heads=64)
    sizes |= dict(num_key_value_heads=1, head_dim=128, max_position_embeddings=65_536)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**sizes)))
    asked = Request(model=str(tmp_path), topology="v5e:2x4", context=65_536, phases=("decode",))
    assert [m for m in choice._meshes(8, 4) if "stage" in m] == [{"data": 1, "stage": 2, "model": 4}]
    chosen = choice.best(asked)
    assert "stage=" in chosen.mesh
    whole = choice._fitting(dataclasses.replace(asked, mesh="model=8", rules="tensor", batch=64), 64)
    assert tokens_per_second(plan(chosen, compiling=False)) > tokens_per_second(plan(whole, compiling=False))


def test_strategies_stop_scaling_where_their_step_is_network(tmp_path):
    chips = (64, 256, 1024, 16_384)
    points = scaling.scale(wide(tmp_path), "v5p", {"narrow": {"model": 4}, "wide": {"model": 64}}, chips)
    narrow, broad = ([p for p in points if p.strategy == name] for name in ("narrow", "wide"))
    assert [p.chips for p in narrow] == list(chips)
    assert narrow[0].step > narrow[1].step > narrow[2].step  # fewer rows of each copy
    assert "copies" in narrow[3].why and narrow[3].step is None  # more copies than rows
    assert all(b.network > n.network for b, n in zip(broad[:2], narrow[:2], strict=True))
    assert (broad[3].slices, broad[3].mesh) == (2, "data=128,model=64")
    assert scaling.stops(points)["narrow"] < 16_384
    scaling.plot(points, tmp_path / "scale.png", "test")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="multiple of 64"):
        scaling.scale(wide(tmp_path), "v5p", {"narrow": {"model": 4}}, (96 + 1,))


def test_the_matrix_says_why_a_cell_is_not_there_and_does_not_plan_one_twice(tmp_path, capsys, monkeypatch):
    asked = wide(tmp_path)
    out = tmp_path / "matrix"
    command = ["--out", str(out), "--models", asked.model, "--passes", "bf16,int8", "--topologies", "v5e:1x1,v5e:4x4"]
    plan_matrix.main([*command, "--shapes-only"])
    lines = [line for line in capsys.readouterr().out.splitlines() if asked.model in line]
    assert len(lines) == 2 and "tok/s" in lines[0] and len(sweep.rows_of(out)) == 4
    assert plan_matrix._cell(None) == "not run"
    monkeypatch.setattr(choice, "ranked", lambda asked: pytest.fail(f"searched again for {asked}"))
    for again in ("--shapes-only", "--markdown"):
        plan_matrix.main([*command, again])
        assert [line for line in capsys.readouterr().out.splitlines() if asked.model in line] == lines
    assert len(sweep.rows_of(out)) == 4


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--topologies", "v5e:9x9", "topology 'v5e:9x9': hosts hold 2x2 chips"),
        ("--models", "lama3", "'lama3'"),
        ("--passes", "int3", "--passes: no 'int3': must be of bf16, int8, int4"),
    ],
)
def test_a_mistake_in_a_cell_is_told_in_a_line(option, value, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        plan_matrix.main(["--out", str(tmp_path / "matrix"), option, value])
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in said[-1] and "Traceback" not in "".join(said)


def test_a_mesh_that_does_not_fit_once_compiled_makes_room_for_the_next_best(monkeypatch):
    asked = Request(model="llama3-8b", topology="v5e:4x4", context=plan_matrix.CONTEXT, phases=("decode",))
    first, second = (dataclasses.replace(asked, mesh=mesh) for mesh in ("stage=2,model=8", "model=16"))
    monkeypatch.setattr(choice, "ranked", lambda _: [first, second])
    cell = [["llama3-8b"], ["bf16"], ["v5e:4x4"]]

    def row(request: Request, free: float, rate: float) -> dict:
        phases = {"decode": {"error": None}}
        return {"request": json.loads(json.dumps(dataclasses.asdict(request))), "memory": {"free": free},
                "phases": phases, "tokens_per_second_per_chip": rate}  # fmt: skip

    large, small = row(first, -1e9, 20.0), row(second, 1e9, 10.0)
    assert plan_matrix.requests(*cell, []) == plan_matrix.requests(*cell, [row(first, 0, 1.0)]) == [first]
    assert plan_matrix.requests(*cell, [large]) == plan_matrix.requests(*cell, [large, small]) == [second]
    assert plan_matrix.best_of([large, small]) is small and plan_matrix.best_of([large, large | {}]) is large
    assert plan_matrix.requests(*cell, [large, row(second, -2e9, 10.0)]) == [first]  # nothing is left


def test_the_readme_has_the_matrix_of_the_rows_that_were_planned():
    lines = (ROOT / "benchmarks" / "results" / "plan_matrix" / sweep.NAME).read_text().splitlines()
    names = (plan_matrix.MODELS, plan_matrix.PASSES, plan_matrix.TOPOLOGIES)
    table = plan_matrix.markdown([json.loads(line) for line in lines], *map(list, names))
    assert table.count("tok/s") > 40 and table in (ROOT / "README.md").read_text()


def test_products_and_steps_are_predicted_within_a_fifth():
    assert all(0.8 < claim.ratio < 1.05 for claim in plan_accuracy.products())
    ours = list(plan_accuracy.steps())
    assert len(ours) == 25 and all(0.65 < claim.ratio < 1.1 for claim in ours)
    exact = [claim for claim in ours if "int4" not in claim.what or claim.source == plan_accuracy.OURS]
    assert len(exact) == 20 and all(0.84 < claim.ratio < 1.05 for claim in exact)
    assert all(0.55 < claim.ratio < 0.95 for claim in plan_accuracy.prompts())
    served = next(plan_accuracy.servers())
    assert "llama3-8b bf16" in served.what and 0.65 < served.ratio < 1  # it serves prompts too
