"""Plans of layers in stages: from shapes, by hand; and from compiled cuts, against whole programs."""

import dataclasses
import json

import pytest
from command import caller
from test_plan_compiled import bytes_by_kind, small
from tpu import needs_libtpu

from jaxinfer.errors import InputError
from jaxinfer.plan import hlo, scaling
from jaxinfer.plan.counts import count
from jaxinfer.plan.estimates import estimated_collectives
from jaxinfer.plan.planning import plan
from jaxinfer.plan.prediction import predict
from jaxinfer.plan.request import Request, check
from jaxinfer.plan.speculation import check_step, parse_decoder
from jaxinfer.plan.turns import Turns, step_of, turns_of
from jaxinfer.sharding.specs import shard_bytes

ALONE = Request(model="llama3-8b", topology="v5e:2x2", mesh="model=4", batch=8, context=4096, passes=("int8",))
STAGED = dataclasses.replace(ALONE, topology="v5e:4x4", mesh="stage=4,model=4")


def test_a_device_has_a_stage_and_the_ends_and_stages_add_up_to_the_model():
    one, four = (check(asked).built for asked in (ALONE, STAGED))
    ends = four.cut(())
    whole, stage, rest = (shard_bytes(b.model, b.shardings) for b in (one, four, ends))
    assert len(four.model.layers) == 8 and 4 * (stage - rest) + rest == whole
    assert shard_bytes(*four.cache(8, 4096)) == pytest.approx(shard_bytes(*one.cache(8, 4096)) / 4, rel=1e-5)
    for tokens, turns in ((1, Turns(4, 1)), (1024, Turns(4, 8))):
        assert turns_of(four, 2, tokens) == turns and turns_of(one, 2, tokens) == Turns(1, 1)
        all_layers, layers = (step_of(b, 2, tokens, 4096 - tokens).work for b in (one, four))
        head = count(four, 2, tokens, 4096 - tokens, layers=False)
        for name in ("product_flops", "attention_flops", "activation_bytes"):
            found = getattr(layers, name) - getattr(head, name)
            assert 4 * found + getattr(head, name) == pytest.approx(getattr(all_layers, name)), name
        # Each piece reads the stage's weights again.
        read = 4 * (layers.weight_bytes - head.weight_bytes) / turns.pieces + head.weight_bytes
        assert read == pytest.approx(all_layers.weight_bytes)


def test_a_step_is_the_sum_of_its_turns_and_of_the_hand_overs():
    one, four = (plan(asked, compiling=False) for asked in (ALONE, STAGED))
    alone, staged = (p.phases["decode"] for p in (one, four))
    assert staged.turns == Turns(4, 1) and alone.turns == Turns(1, 1)
    assert staged.times.memory == pytest.approx(alone.times.memory)  # each layer is waited for, wherever it is
    assert staged.work.cache_bytes == alone.work.cache_bytes / 4
    more = bytes_by_kind(staged.collectives)
    hidden = 8 * 4096 * 2
    assert more["collective-permute"] == (4 + 1) * hidden  # from stage to stage, and home
    assert more["all-reduce"] == bytes_by_kind(alone.collectives)["all-reduce"] + hidden
    assert staged.times.network > alone.times.network


def test_a_prompt_fills_the_stages_and_waits_for_the_last_to_be_done():
    one, four = (plan(asked, compiling=False) for asked in (ALONE, STAGED))
    phase, built, hardware = four.phases["prefill"], four.target.built, four.target.topology.hardware
    assert (phase.rows, phase.tokens, phase.turns, phase.turns.count) == (1, 1024, Turns(4, 4), 7)
    pieces = [count(built, 1, 256, 3072 + at, 4096, ends=False) for at in (0, 256, 512, 768)]
    turns = [*pieces[:-1], *pieces[-1:] * 4, count(built, 1, 1024, 3072, layers=False)]
    by_hand = sum(predict(work, 0, hardware).step for work in turns)
    assert phase.times.memory + phase.times.products == pytest.approx(by_hand)
    reads_little = phase.times.products / one.phases["prefill"].times.products
    assert reads_little == pytest.approx(7 / 16, rel=0.05)  # 7 turns of a quarter of the tokens and of the layers


def test_layers_that_stages_do_not_divide_are_refused_with_a_mesh_that_fits():
    asked = dict(model="llama3-405b", topology="v5p:4x4x4", batch=16)
    with pytest.raises(InputError, match=r"mesh stage=4,model=16: layers=126 .* not divided by stage=4 .*; ") as said:
        check(Request(**asked, mesh="stage=4,model=16"))
    fits = str(said.value).split("; ")[-1].removesuffix(" fits")
    assert fits == "stage=2,model=32" and check(Request(**asked, mesh=fits)).built.stages == 2
    with pytest.raises(InputError, match="ByPosition decides which layers run, and stage=4 divides them in order"):
        check(dataclasses.replace(STAGED, passes=("skip_decode:end=64,share=0.5",)))


def test_speculation_and_growing_machines_take_turns_too():
    found, decoder = plan(STAGED, compiling=False), parse_decoder("speculative:length=4")
    plain, checked = found.phases["decode"].times, check_step(found, decoder)
    assert plain.memory < checked.memory < 1.1 * plain.memory  # five tokens read the same weights, in as many turns
    asked = dataclasses.replace(ALONE, topology="", batch=64)
    few, many = scaling.scale(asked, "v5e", {"stages": {"stage": 4, "model": 4}}, (16, 64))
    assert (few.mesh, many.mesh) == ("data=1,stage=4,model=4", "data=4,stage=4,model=4") and many.step < few.step


def test_cuts_of_stages_add_up_to_the_whole_program(tmp_path):
    model = small(tmp_path, num_hidden_layers=8)
    asked = dict(model=model, topology="cpu:8", mesh="data=2,stage=2,model=2", batch=4, context=512, dtype="float32")
    scaled, whole = (plan(Request(**asked, whole=whole)) for whole in (False, True))
    built = scaled.target.built
    for name, turns in (("prefill", Turns(2, 2)), ("decode", Turns(2, 1))):
        phase = scaled.phases[name]
        a, b = phase.compiled, whole.phases[name].compiled
        assert (a.layers, a.whole, b.layers, b.whole) == ((1, 2), False, (4,), True) and phase.turns == turns
        assert (a.arguments, a.cache) == (b.arguments, b.cache) and dict(a.collectives) == dict(b.collectives)
        assert a.flops == pytest.approx(b.flops, rel=0.01)
        compiled, estimated = map(
            bytes_by_kind, (phase.collectives, estimated_collectives(built, phase.rows, phase.tokens))
        )
        for kind in ("all-reduce", "collective-permute"):
            assert compiled[kind] == estimated[kind], (name, kind)
        assert a.weights == pytest.approx(shard_bytes(built.model, built.shardings), rel=0.01)  # and the new tokens
    assert scaled.memory.total == pytest.approx(whole.memory.total, rel=0.03)
    assert scaled.memory.cache == pytest.approx(shard_bytes(*built.cache(4, 512)), rel=0.01)


@needs_libtpu
def test_stages_are_compiled_for_a_tpu_and_their_turns_counted(tmp_path, capsys):
    model = small(tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=1024)
    arguments = ["--topology", "v5e:2x2", "--mesh", "stage=2,model=2", "--batch", "4", "--context", "512"]
    status, out, err = caller(capsys)("plan", model, "--pass", "kv_int8", "--decode-only", *arguments, "--json")
    assert status == 0, err
    decode = json.loads(out)["phases"]["decode"]
    assert decode["turns"] == {"stages": 2, "pieces": 1, "count": 2}
    assert decode["compiled"]["kernels"] == {"decode_attention": 4}  # of two layers, in both turns
    request = Request(
        model=model, topology="v5e:2x2", mesh="stage=2,model=2", batch=4, context=512, passes=("kv_int8",)
    )
    estimated = bytes_by_kind(estimated_collectives(check(request).built, 4, 1))
    for kind in ("all-reduce", "collective-permute"):
        found = sum(c["count"] * c["bytes"] for c in decode["collectives"] if c["kind"] == kind)
        assert found == pytest.approx(estimated[kind], rel=0.01), kind


@needs_libtpu
def test_pieces_of_a_prompt_that_a_context_divides_are_gathered_in_every_turn(tmp_path):
    model = small(
        tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=1024, max_position_embeddings=2048
    )
    asked = Request(
        model=model, topology="v5e:2x2", mesh="stage=2,context=2", batch=1, context=2048, phases=("prefill",)
    )
    compiled, estimated = (plan(asked, compiling=compiling).phases["prefill"] for compiling in (True, False))
    assert compiled.turns.pieces > 1 and compiled.error is None
    by_kind = [bytes_by_kind(phase.collectives) for phase in (compiled, estimated)]
    for kind in ("all-gather", "all-reduce", "collective-permute"):
        assert by_kind[0][kind] == pytest.approx(by_kind[1][kind], rel=0.01), kind


def test_the_report_says_how_a_step_goes_through_its_stages(capsys):
    arguments = ["--topology", "v5e:4x4", "--mesh", "stage=4,model=4", "--batch", "8", "--context", "4096"]
    status, out, err = caller(capsys)("plan", "llama3-8b", "--shapes-only", *arguments)
    assert status == 0, err
    assert "  in 4 pieces of 256 tokens, through 4 stages in 7 turns, of which a device works in 4 (57%)\n" in out
    assert "  through 4 stages in 4 turns, of which a device works in 1 (25%)\n" in out


def test_a_loop_of_a_tpu_runs_to_where_its_condition_counts():
    text = """
%below.1 (p: (s32[], f32[8])) -> pred[] {
  %bound.2 = s32[]{:T(128)} constant(3)
  %other = s32[] constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %bound.2), direction=LT, metadata={op_name="lt"}
}

%until (p: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a = f32[8] all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%i), condition=%below.1, body=%body
  ROOT %u = (s32[], f32[8]) while(%w), condition=%until, body=%body
}
"""
    assert hlo.read(text).collectives == {hlo.Collective("all-reduce", 32, (0, 1)): 3 + 1}
