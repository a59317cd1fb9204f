"""Plans from shapes: topologies, counts against XLA's, network times, what fits, and what people get wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import caller
from models import tiny_config, tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.models.transformer import abstract
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV
from jaxinfer.plan import hlo, sweep
from jaxinfer.plan.alternatives import alternatives
from jaxinfer.plan.building import Built, abstract_mesh, build, cuts
from jaxinfer.plan.compiling import combine
from jaxinfer.plan.counts import count
from jaxinfer.plan.estimates import estimated_collectives
from jaxinfer.plan.hardware import HARDWARE, HOP
from jaxinfer.plan.network import collective_seconds
from jaxinfer.plan.planning import plan
from jaxinfer.plan.request import Request, check
from jaxinfer.plan.shapes import SHAPES, find_shape
from jaxinfer.plan.speculation import Speculation, check_step, parse_decoder
from jaxinfer.plan.topology import parse_topology
from jaxinfer.sharding.specs import shard_bytes
from jaxinfer.tree import select

V5E = HARDWARE["v5e"]
ASKED = Request(model="llama3-8b", topology="v5e:4x4", mesh="data=4,model=4", batch=8, context=1024)


@pytest.fixture
def command(capsys):
    return caller(capsys)


def alone(config, *passes: str) -> Built:
    return build(config, "float32", passes, abstract_mesh({"model": 1}))


def test_published_shapes_have_their_published_parameters():
    billions = {name: sum(x.size for x in jax.tree.leaves(abstract(config))) / 1e9 for name, config in SHAPES.items()}
    known = {"llama2-7b": 6.74, "llama2-13b": 13.02, "llama2-70b": 68.98, "llama3-8b": 8.03, "llama3-70b": 70.55}
    known |= {"llama3-405b": 405.85, "qwen3-30b-a3b": 30.53, "qwen3-235b-a22b": 235.09}
    assert billions == pytest.approx(known, rel=1e-3)


def test_flops_are_those_of_xla_where_it_sees_them_all():
    config = tiny_config(embed_dim=128, mlp_dim=256, num_heads=4, num_kv_heads=2, head_dim=32, windows=())
    built = alone(config)
    rows, tokens, slots = 4, 64, 256
    cache = jax.eval_shape(lambda: built.model.init_cache(rows, slots))

    def step(model, cache, tokens):
        hidden, cache = model(tokens, cache)
        return cache, model.logits(hidden[:, -1:])

    shape = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    theirs = jax.jit(step).lower(built.model, cache, shape).compile().cost_analysis()["flops"]
    work = count(built, rows, tokens, slots - tokens)
    # XLA scores all slots, seen or not, in each branch of the read; ours are those in sight.
    products = work.flops - work.attention_flops
    assert work.attention_flops == 4 * rows * config.num_layers * 4 * 32 * sum(range(193, 257))
    assert products == 2 * rows * (tokens * sum(_matrices(built.model.layers)) + 96 * 128)
    assert products < theirs < 1.6 * work.flops


def _matrices(tree) -> list[int]:
    return [leaf.size for leaf in jax.tree.leaves(tree) if len(leaf.shape) > 1]


def test_bytes_are_those_of_the_leaves():
    config = tiny_config(windows=())
    built = alone(config)
    work = count(built, 2, 1, 255)
    assert work.weight_bytes == 4 * sum(x.size for x in jax.tree.leaves(built.model))  # tied: the table is read
    assert work.cache_bytes == 2 * 2 * 2 * 256 * 2 * 8 * 4  # layers, K and V, rows, slots, heads, head_dim, float32
    eighth = count(build(config, "float32", (), abstract_mesh({"data": 2, "model": 2})), 4, 1, 255)
    assert eighth.cache_bytes == work.cache_bytes / 2  # twice the rows on four devices
    windowed = count(alone(tiny_config()), 2, 1, 255)  # the first layer sees 24 tokens
    assert windowed.cache_bytes == work.cache_bytes * (256 + 24) / 512
    forgetting = count(alone(config, "kv_window:sinks=4,window=28"), 2, 1, 255)
    assert forgetting.cache_bytes == work.cache_bytes * (4 + 28 + 32) / 256  # the window and what it can be rewound by
    assert forgetting.attention_flops == work.attention_flops * (28 + 32) / 256
    int8 = count(alone(config, "int8"), 2, 1, 255)
    assert 0.25 < int8.weight_bytes / work.weight_bytes < 0.35 and int8.product_flops == work.product_flops
    assert count(alone(config, "w8a8"), 2, 1, 255).integer_flops == work.product_flops


def test_a_divided_context_divides_the_cache_its_reading_and_the_work_on_a_prompt():
    one, four = (build(tiny_config(), "float32", (), abstract_mesh({"context": n, "model": 2})) for n in (1, 4))
    assert shard_bytes(*four.cache(2, 1024)) == pytest.approx(shard_bytes(*one.cache(2, 1024)) / 4, rel=0.01)
    assert shard_bytes(four.model, four.shardings) == shard_bytes(one.model, one.shardings)
    step, whole = (count(b, 2, 1, 1023) for b in (four, one))
    assert step.product_flops == whole.product_flops and step.weight_bytes == whole.weight_bytes
    of_layers = (24, 1024), (24, 256)  # tokens that the two layers read: the first one's window may be all on a device
    assert step.cache_bytes == pytest.approx(whole.cache_bytes * sum(of_layers[1]) / sum(of_layers[0]))
    few = count(four, 2, 1, 255, context=1024)
    assert few.cache_bytes == count(one, 2, 1, 255).cache_bytes  # one device has all that there is
    chunk, whole = (count(b, 2, 128, 896) for b in (four, one))
    layers, head = (
        sum(2 * x.size for x in jax.tree.leaves(t) if len(x.shape) > 1) for t in (one.model.layers, one.model.embed)
    )
    assert whole.product_flops == 2 * (128 * layers + head) / 2 and chunk.product_flops == 2 * (32 * layers + head) / 2
    assert chunk.attention_flops < whole.attention_flops
    network = [bytes_of(estimated_collectives(b, 2, 1), "all-reduce") for b in (one, four)]
    assert network[1] - network[0] == 2 * 2 * 2 * (8 + 2) * 4  # layers, rows, heads, the output and two numbers


def bytes_of(collectives, kind: str) -> float:
    return sum(n * c.bytes for c, n in collectives.items() if c.kind == kind)


def test_experts_that_no_token_chose_are_not_read():
    built = alone(tiny_config(moe=tiny_moe()))
    experts = sum(
        4 * leaf.size for k in ("gate", "up", "down") for leaf in [getattr(built.model.layers[1].mlp, k).kernel]
    )
    one, many = count(built, 1, 1, 0), count(built, 64, 1, 0)
    assert many.weight_bytes - one.weight_bytes == pytest.approx(experts * (0.5 - 0.5**64), rel=1e-6)  # 2 of 4 a token
    assert many.product_flops == pytest.approx(64 * one.product_flops)


def test_cuts_count_every_layer_once():
    model = abstract(tiny_config(num_layers=5, windows=(24, None, None, 24, None)))
    found = cuts(model)
    assert sorted(layers for layers, _ in found) == [(0, 0, 1), (0, 1), (0, 1, 1)]
    for kind, layers in ((0, 2), (1, 3)):
        assert sum(weight * cut.count(kind) for cut, weight in found) == layers
    assert sum(weight for _, weight in found) == 1  # the head


def test_network_times_by_hand():
    shape, hw = (16, 16), V5E
    at = np.indices((16, 16, 1)).reshape(3, -1).T
    ring, line = at[:16], at[:8]  # a whole dimension closes, half of it does not
    share = lambda n: 1e6 * (n - 1) / n  # noqa: E731
    assert collective_seconds("all-gather", 1e6, ring, shape, hw) == share(16) / 90e9 + 8 * HOP
    assert collective_seconds("all-gather", 1e6, line, shape, hw) == share(8) / 45e9 + 7 * HOP
    assert collective_seconds("all-reduce", 1e6, ring, shape, hw) == 2 * (share(16) / 90e9 + 8 * HOP)
    assert collective_seconds("all-gather", 1e6, at, shape, hw) == pytest.approx(share(256) / 180e9 + 16 * HOP)
    assert collective_seconds("all-to-all", 1e6, ring, shape, hw) == 1e6 * 16 / 8 / 45e9 + 8 * HOP
    assert collective_seconds("all-reduce", 1e6, ring[:1], shape, hw) == 0
    apart = at[::32][:8]  # every second chip of a dimension: groups share its links
    assert collective_seconds("all-gather", 1e6, apart, shape, hw) == share(8) / (90e9 / 2) + 8 * HOP
    both = np.array([[0, 0, 0, 0], [0, 0, 0, 1]])  # the two devices of a chip
    assert collective_seconds("all-gather", 1e6, both, (4, 4, 4), HARDWARE["tpu7x"]) < 1e6 / 100e9


def test_collectives_are_read_from_hlo_in_every_notation():
    text = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8]{0:T(256)} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%fused_computation.1 (p: f32[8]) -> (f32[8], u32[]) {
  %b = f32[16] all-gather(%x), replica_groups={{0,1}}
}

%async_collective_fusion.2 (p: f32[8]) -> f32[8] {
  %b.1 = f32[16] all-gather(%x), replica_groups={{0,1}}
}

%fused_computation.3 (p: f32[8]) -> f32[16] {
  %b.2 = f32[16] all-gather(%x), replica_groups={{0,1}}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %async-collective-start = (f32[8], u32[]) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %fusion.2 = f32[8] fusion(%async-collective-start, %y), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done = f32[16] fusion(%fusion.2), kind=kCustom, calls=%fused_computation.3
  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%x), replica_groups=mesh['data'=2,'model'=4] {'data'}
  %r = f32[4]{0} reduce-scatter(%x), replica_groups={{0,2},{1,3}}, dimensions={0}
  %t = s32[16]{0} all-to-all(%x), replica_groups=[4,2]<=[2,4]T(1,0)
  %s = f32[2] all-reduce(%x), replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}, to_apply=%add
  %p = f32[4] collective-permute(%x), source_target_pairs={{0,2},{2,0}}
  %w = (s32[], f32[8]) while(%i), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %k = f32[8] custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/decode/pallas_call"}
  ROOT %done = f32[8] copy(%w)
}
"""
    found = hlo.read(text)
    assert found.collectives == {
        hlo.Collective("all-reduce", 32, (0, 1, 2, 3)): 3,
        hlo.Collective("all-gather", 64, (0, 4)): 1,
        hlo.Collective("reduce-scatter", 32, (0, 2)): 1,
        hlo.Collective("all-to-all", 64, (0, 4)): 1,
        hlo.Collective("all-gather", 64, (0, 1)): 1,  # one, that is begun, waited for and ended
        hlo.Collective("all-reduce", 8, (0, 2, 4, 6)): 1,
        hlo.Collective("collective-permute", 16, (0, 2)): 1,
    }
    assert found.kernels == {"decode": 1}
    once = ("all-gather", "reduce-scatter", "all-to-all", "collective-permute", "custom-call", "copy")
    assert found.launches == {"fusion": 3, "all-reduce": 1 + 3, **dict.fromkeys(once, 1)}


def test_launches_of_a_gpus_program_take_time_and_are_counted_once_each():
    text = """
%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  ROOT %a = f32[8] add(%p, %p)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %b = f32[4,2] bitcast(%x)
  %f = f32[8] fusion(%x), kind=kLoop, calls=%fused_add
  %k = f32[8] custom-call(%f), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(f)/rms_norm/mpmd_map"}
  ROOT %t = (f32[8]) tuple(%k)
}
"""
    found = hlo.read(text)
    assert found.launches == {"fusion": 1, "custom-call": 1} and found.kernels == {"rms_norm": 1}
    asked = dataclasses.replace(ASKED, model="llama3-8b", topology="h100:1", mesh="model=1", phases=("decode",))
    one, more = (plan(dataclasses.replace(asked, batch=batch), compiling=False).phases["decode"] for batch in (1, 2))
    assert one.times.launches == one.launches * 1.7e-6 == more.times.launches
    parts = one.times.memory + one.times.products + one.times.network
    assert one.times.step == pytest.approx(parts + one.times.launches)
    on_tpu = plan(dataclasses.replace(asked, topology="v5e:1x1"), compiling=False).phases["decode"]
    assert on_tpu.times.launches == 0 < on_tpu.launches


def test_one_devices_plan_is_of_the_layout_that_one_device_loads():
    asked = dataclasses.replace(ASKED, passes=("int8",))
    alone = check(dataclasses.replace(asked, topology="h100:1", mesh="model=1")).built.model
    mesh = dataclasses.replace(asked, topology="h100:2", mesh="model=2")
    assert len(select(alone, FusedQKV)) == len(select(alone, FusedGateUp)) == 32
    assert not select(check(mesh).built.model, (FusedQKV, FusedGateUp))


def test_what_does_not_fit_says_by_how_much_and_what_does(tmp_path):
    sizes = dict(hidden_size=8192, intermediate_size=65_536, num_hidden_layers=6, num_attention_heads=64)
    sizes |= dict(num_key_value_heads=32, head_dim=128, max_position_embeddings=8192)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**sizes)))
    asked = dataclasses.replace(ASKED, model=str(tmp_path), mesh="data=16", batch=64, context=8192)
    found = plan(asked, compiling=False)
    assert not found.memory.fits and found.memory.free == pytest.approx(found.memory.usable - found.memory.total)
    nearby = alternatives(found)
    assert len(nearby) == 3 and len({a.change for a in nearby}) == 3
    for way in nearby:
        again = plan(way.request, compiling=False)
        assert again.memory.fits and again.memory.free == pytest.approx(way.free)


def test_stages_are_a_way_out_where_key_heads_are_repeated(tmp_path):
    """One key head on eight devices is eight times in memory; in two stages of four four times."""
    sizes = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=1, head_dim=128, max_position_embeddings=1 << 20)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(**sizes)))
    asked = Request(model=str(tmp_path), topology="v5e:2x4", mesh="model=8", batch=4, context=1 << 20)
    found = plan(dataclasses.replace(asked, phases=("decode",)), compiling=False)
    assert not found.memory.fits
    (way,) = (a for a in alternatives(found) if a.request.mesh != "model=8")
    assert way.change == "--mesh stage=2,model=4"
    again = plan(way.request, compiling=False)
    assert again.memory.fits and again.memory.free == pytest.approx(way.free)


def test_more_chips_and_fewer_bytes_are_faster():
    base = plan(ASKED, compiling=False)
    int8 = plan(dataclasses.replace(ASKED, passes=("int8", "kv_int8")), compiling=False)
    step = lambda p: p.phases["decode"].times  # noqa: E731
    assert step(base).limit == "HBM" and 0.5 < step(int8).memory / step(base).memory < 0.62
    assert step(base).roofline < step(base).step
    larger = plan(dataclasses.replace(ASKED, topology="v5p:2x2x4"), compiling=False)
    assert step(larger).memory == pytest.approx(step(base).memory * 819 / 2765)
    # A prompt in chunks: each attends to those before it, so the whole is less than as many last ones.
    last, chunks = base.phases["prefill"], ASKED.context // base.phases["prefill"].tokens
    assert base.prefill.step <= chunks * last.times.step * (1 + 1e-9)


def test_speculation_is_the_formula_of_its_paper():
    decoder = parse_decoder("speculative:length=4,acceptance=0.7")
    assert decoder == Speculation(4, 0.7, 0.0)
    assert decoder.tokens == pytest.approx(1 + 0.7 + 0.49 + 0.343 + 0.2401)
    assert parse_decoder("") is None and Speculation(3, 1.0, 0.0).tokens == 4
    found = plan(ASKED, compiling=False)
    plain, check = found.phases["decode"].times, check_step(found, decoder)
    assert plain.step < check.step < 1.5 * plain.step  # five tokens read the same weights
    slower = check_step(found, dataclasses.replace(decoder, draft=0.1))
    assert slower.step == pytest.approx(check.step + 0.4 * plain.step)


def test_a_sweep_goes_on_and_does_nothing_twice(tmp_path, monkeypatch):
    asked = [dataclasses.replace(ASKED, batch=n, phases=("decode",)) for n in (4, 8, 6)]
    planned = []
    original = sweep.plan
    monkeypatch.setattr(sweep, "plan", lambda r, **o: (planned.append(r.batch), original(r, **o))[1])
    sweep.run(asked[:1], tmp_path, compiling=False)
    with (tmp_path / sweep.NAME).open("a") as file:
        file.write('{"run": "cut short')
    rows = sweep.run(asked, tmp_path, compiling=False)
    assert planned == [4, 8, 6] and sweep.run(asked, tmp_path, compiling=False) == rows and planned == [4, 8, 6]
    assert "batch=6" in rows[2]["error"] and sweep.why_not(rows[0]) is None
    rate = rows[0]["tokens_per_second_per_chip"]
    assert sweep.dollars_per_million(rows[0], {"v5e": 3.6}) == pytest.approx(1e3 / rate)


def test_the_sweep_command_makes_a_table_and_a_picture(command, tmp_path):
    (tmp_path / "set.txt").write_text("int8\nint8 kv_int8\n")
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    arguments = ["--topology", "v5e:2x4", "--mesh", "model=8", "--mesh", "data=2,model=4", "--batch", 16]
    arguments += ["--context", 512]
    arguments += ["--pass-set", tmp_path / "set.txt", "--price", "v5e=1.2", "--out", tmp_path, "--shapes-only"]
    status, out, err = command("plan", "--sweep", tmp_path, "--decode-only", *arguments)
    assert status == 0, err
    assert out.count("v5e:2x4") == 4 and "$/Mtok" in out
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology", "v5x:4x4"], "no kind 'v5x'; did you mean"),
        (["--topology", "v5e:4x4x4"], "v5e has 2 dimensions, as in v5e:4x4"),
        (["--topology", "v5e:3x4"], "v5e:4x4 exists"),
        (["--topology", "v5e:32x32"], "256 at most"),
        (["--topology", "v5e"], "write kind:chips along each dimension"),
        (["--topology", "v5e:4x4", "--mesh", "data=2,model=4"], "has 8 devices, and v5e:4x4 has 16; data=2,model=8"),
        (["--topology", "tpu7x:2x2x1", "--mesh", "model=4"], "(4 chips of 2 devices)"),
        (["--topology", "v5e:8x8", "--mesh", "model=64"], "heads=32"),
        (["--topology", "v5e:4x4", "--mesh", "data=16", "--batch", "3"], "give a multiple, such as 16"),
        (["--topology", "v5e:4x4", "--context", "9000"], "trained for 8192"),
        (["--topology", "v5e:4x4", "--batch", "0"], "must be 1 or more"),
        (["--topology", "v5e:4x4", "--batch", "2", "--batch", "4"], "--sweep takes several"),
        (["--topology", "v5e:4x4", "--decoder", "speculative:length=0"], "length=0 must be"),
        (["--topology", "v5e:4x4", "--decoder", "speculativ"], "did you mean 'speculative'"),
        (["--topology", "v5e:4x4", "--rules", "tensr"], "did you mean 'tensor'"),
        (["--topology", "v5e:4x4", "--price", "v5e=1"], "is for --sweep"),
        ([], "no topology"),
    ],
)
def test_mistakes_are_one_line_with_the_fix(command, arguments, message):
    status, out, err = command("plan", "llama3-8b", "--shapes-only", *arguments)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert message in err, err


def test_models_are_found_by_file_too(command, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    assert find_shape(str(tmp_path))[0] == find_shape(str(tmp_path / "config.json"))[0]
    status, _, err = command("plan", "llama3-9b", "--topology", "cpu:8")
    assert status == 2 and "did you mean" in err and "llama3-8b" in err
    with pytest.raises(InputError, match="no kind"):
        parse_topology("gpu:8")


def hf_config(**changes) -> dict:
    """Return a small Llama's config.json."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8, vocab_size=128)
    base = dict(model_type="llama", num_key_value_heads=4, head_dim=16, max_position_embeddings=512)
    return {**base, **sizes, "tie_word_embeddings": False, **changes}


def test_collectives_are_counted_where_a_program_can_not_be_read_back():
    sums = dict.fromkeys(("arguments", "cache", "code", "flops", "bytes", "launches", "temporaries"), 8)
    seconds = dict.fromkeys(("trace_seconds", "compile_seconds", "processor_seconds"), 1.0)
    read = {**sums, **seconds, "kernels": {"decode": 1}, "collectives": [["all-reduce", 64, [0, 1], 2]]}
    cuts = (((0,), -1), ((0, 0), 2))
    known = combine([read, read], cuts, False)
    assert known.kernels == {"decode": 1} and sum(known.collectives.values()) == 2
    unread = combine([read, {**read, "kernels": None, "collectives": None}], cuts, False)
    assert (unread.arguments, unread.kernels, unread.collectives) == (8, None, None)
    phase = plan(Request(model="llama3-8b", topology="v5e:2x2", batch=1, context=256), compiling=False).phases["decode"]
    assert [dataclasses.replace(phase, compiled=c).estimated for c in (None, unread, known)] == [True, True, False]
