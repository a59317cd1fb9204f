"""Plans that compile: on simulated CPU devices, and with libtpu for TPUs that are not there."""

import dataclasses
import json
import subprocess
import sys

import pytest
from command import caller
from test_plan import hf_config
from tpu import needs_libtpu

from jaxinfer.plan import topology
from jaxinfer.plan.estimates import estimated_collectives
from jaxinfer.plan.planning import plan
from jaxinfer.plan.request import Request
from jaxinfer.sharding.specs import shard_bytes


def small(folder, **changes) -> str:
    """Write a small model's config.json and return its path."""
    (folder / "config.json").write_text(json.dumps(hf_config(**changes)))
    return str(folder / "config.json")


def bytes_by_kind(collectives) -> dict[str, float]:
    found: dict[str, float] = {}
    for c, n in collectives.items():
        found[c.kind] = found.get(c.kind, 0) + n * c.bytes
    return found


def test_cuts_add_up_to_the_whole_program(tmp_path):
    asked = dict(
        model=small(tmp_path), topology="cpu:8", mesh="data=2,model=4", batch=4, context=256, phases=("decode",)
    )
    scaled, whole = (plan(Request(**asked, whole=whole)) for whole in (False, True))
    a, b = (p.phases["decode"].compiled for p in (scaled, whole))
    assert (a.layers, a.whole, b.layers, b.whole) == ((1, 2), False, (4,), True)
    assert (a.arguments, a.cache) == (b.arguments, b.cache) and dict(a.collectives) == dict(b.collectives)
    assert a.flops == pytest.approx(b.flops, rel=0.01)
    built = scaled.target.built
    assert a.weights == pytest.approx(shard_bytes(built.model, built.shardings), rel=0.01)  # and the new tokens
    assert scaled.phases["decode"].times is None and scaled.memory.free is None  # no peaks of a CPU are known


def test_a_divided_context_moves_what_is_counted_for_it(tmp_path):
    """Keys and values of a chunk, queries on their way round, parts of a step; and a quarter of a row's cache each."""
    asked = Request(
        model=small(tmp_path), topology="cpu:8", mesh="context=4,model=2", batch=4, context=512, dtype="float32"
    )
    found = plan(asked)
    built, phases = found.target.built, found.phases
    for name, kinds in (("prefill", {"all-gather", "all-reduce", "collective-permute"}), ("decode", {"all-reduce"})):
        phase = phases[name]
        assert phase.error is None, phase.error
        compiled = bytes_by_kind(phase.collectives)
        estimated = bytes_by_kind(estimated_collectives(built, phase.rows, phase.tokens))
        assert set(estimated) == kinds
        for kind in kinds:
            assert compiled[kind] == pytest.approx(estimated[kind], rel=0.01), (name, kind)
        assert compiled.get("all-gather", 0) < found.memory.cache / 2 or name == "prefill"
        assert all(c.group for c in phase.collectives)
    whole = shard_bytes(
        *plan(dataclasses.replace(asked, topology="cpu:2", mesh="model=2"), compiling=False).target.built.cache(4, 512)
    )
    assert found.memory.cache == pytest.approx(whole / 4, rel=0.01)


@needs_libtpu
def test_a_tpu_program_is_compiled_without_a_tpu(tmp_path, capsys):
    model = small(tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=1024)
    arguments = ["--topology", "v5e:2x2", "--mesh", "data=2,model=2", "--batch", "4", "--context", "512", "--json"]
    status, out, err = caller(capsys)("plan", model, "--pass", "kv_int8", "--decode-only", *arguments)
    assert status == 0, err
    found = json.loads(out)
    decode = found["phases"]["decode"]
    assert decode["compiled"]["kernels"] == {"decode_attention": 4}  # under shard_map, one a layer
    reduced = [c for c in decode["collectives"] if c["kind"] == "all-reduce" and c["bytes"] == 2 * 512 * 2]
    assert sum(c["count"] for c in reduced) == 9 and {c["devices"] for c in reduced} == {2}  # two a layer, and tokens
    assert decode["compiled"]["flops"] == pytest.approx(decode["flops"]["products"], rel=0.1)
    assert found["memory"]["fits"] and 0 < decode["times"]["roofline"] < decode["times"]["step"]
    request = Request(model=model, topology="v5e:2x2", mesh="data=2,model=2", batch=4, context=512, passes=("kv_int8",))
    estimated = bytes_by_kind(estimated_collectives(plan(request, compiling=False).target.built, 4, 1))
    compiled = sum(c["count"] * c["bytes"] for c in decode["collectives"] if c["kind"] == "all-reduce")
    assert compiled == pytest.approx(estimated["all-reduce"], rel=0.05)


def test_without_libtpu_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    status, out, err = caller(capsys)("plan", "llama3-8b", "--topology", "v5e:2x2")
    assert (status, out) == (2, "") and 'pip install "jaxinfer[plan]"' in err and err.count("\n") == 1
    status, _, err = caller(capsys)("plan", "llama3-8b", "--topology", "h100:8")
    assert status == 2 and "jax-cuda13-plugin" in err


def test_an_ordinary_run_never_sees_libtpu():
    code = "import sys, jaxinfer.cli.plan, jaxinfer.plan.planning; print([m for m in sys.modules if 'libtpu' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]" and done.stderr == ""
