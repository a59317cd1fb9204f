"""Sizes against counted bytes, speeds with known clocks, and the roofline's bytes and FLOPs against a hand count."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_program, tiny_config, tiny_moe

from jaxinfer.cache.dense import Dense, DenseLayer
from jaxinfer.errors import InputError
from jaxinfer.eval import roofline, size, speed


def test_buffers_are_counted_once(tiny):
    leaves = jax.tree.leaves(tiny.model)
    assert size.buffer_bytes(tiny.model) == 4 * sum(leaf.size for leaf in leaves)
    x = jnp.zeros((64, 3), jnp.uint8)
    assert size.buffer_bytes([x, x, np.zeros(5, np.float64)]) == 64 * 3 + 40
    assert size.buffer_bytes(jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)) == 12


@nnx.dataclass
class Residue(DenseLayer):
    """A dense cache and 1,000 bytes that do not grow."""

    rest: jax.Array = nnx.data(kw_only=True)


@dataclasses.dataclass(frozen=True)
class WithResidue:
    """The kind of it."""

    def create(self, batch, slots, kv_heads, head_dim, dtype):
        dense = Dense().create(batch, slots, kv_heads, head_dim, dtype)
        return Residue(k=dense.k, v=dense.v, rest=jnp.zeros(1000, jnp.uint8))


def test_a_cache_is_measured_as_fixed_and_per_token(tiny):
    layer = 2 * 2 * 8 * 4  # K and V, heads, their width, float32
    assert size.cache_cost(tiny) == size.CacheCost((0, 0), (layer, layer))
    model = jax.tree.map(lambda x: x, tiny.model)
    model.layers[0].attention.cache = WithResidue()
    assert size.cache_cost(tiny.replace(model=model)) == size.CacheCost((1000, 0), (layer, layer))


def test_the_run_holds_weights_cache_and_more(tiny):
    found = size.measure_size(tiny, list(range(60)), 20)
    assert found.weight_bytes == size.buffer_bytes(tiny.model) and found.kv_bytes_per_token == 256
    assert found.weight_bytes + 256 * 256 < found.run_bytes < 4 * found.weight_bytes + 256 * 256 + 4 * 64 * 96 * 60
    assert (found.peak_bytes is None) == (jax.local_devices()[0].memory_stats() is None)


def test_programs_alternate_and_the_first_round_is_not_counted(tiny, monkeypatch):
    order = []
    clock = itertools.count()
    one = speed._one_round
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(speed, "_one_round", lambda program, *rest: order.append(program.name) or one(program, *rest))
    programs = {name: tiny.replace(name=name) for name in "ab"}
    found = speed.measure_speed(programs, [1, 2, 3], new_tokens=5, rounds=2, batch=2)
    assert order == ["a", "b", "b", "a", "a", "b"]
    # The clock ticks once a look: prompt done, first token, last token.
    assert found == {name: [speed.Round(1.0, 2.0, 1.0, 2 * 4, 3.0)] * 2 for name in "ab"}


def test_a_rate_compares_round_by_round():
    found = speed.rate([10.0, 30.0, 20.0], [5.0, 10.0, 40.0])
    assert (found.median, found.ratio) == (20.0, 2.0)
    assert found.p10 == pytest.approx(12.0) and found.ratio_p90 == pytest.approx(2.8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rounds": 0}, "rounds=0: must be 1 or more"),
        ({"batch": 0}, "batch=0"),
        ({"new_tokens": 1}, "decode tokens=1: must be 2 or more"),
        ({"prompt": []}, "a prompt of 0 tokens"),
        ({"prompt": [1] * 508}, "a prompt of 508 tokens and 5 after it: .* context of 512"),
    ],
)
def test_bad_speed_options_are_refused(tiny, change, message):
    options = {"prompt": [1, 2], "new_tokens": 5, "rounds": 1, **change}
    with pytest.raises(InputError, match=message):
        speed.measure_speed({"a": tiny}, **options)


def test_the_bytes_of_a_decode_step():
    weights = lambda program: size.buffer_bytes(program.model)  # noqa: E731
    tied = random_program(tiny_config(windows=(24, None)))
    layer = 2 * 2 * 8 * 4
    cost = size.cache_cost(tied)
    assert roofline.decode_bytes(tied, cost, 10) == weights(tied) + 2 * 10 * layer
    assert roofline.decode_bytes(tied, cost, 100, rows=3) == weights(tied) + 3 * (24 + 100) * layer
    untied = random_program(tiny_config(tie_embeddings=False, windows=()))
    assert roofline.decode_bytes(untied, size.cache_cost(untied), 0) == weights(untied) - 96 * 32 * 4
    residue = size.CacheCost((1000.0, 0.0), (0.0, 2.0))
    assert roofline.decode_bytes(tied, residue, 100) == weights(tied) + 1000 + 200
    experts = random_program(tiny_config(moe=tiny_moe()))
    kernels = 4 * 3 * 4 * 32 * 24
    assert roofline.decode_bytes(experts, cost, 0) == weights(experts) - kernels / 2  # two of four experts
    assert roofline.decode_bytes(experts, cost, 0, rows=2) == weights(experts)


def test_the_flops_of_a_prefill():
    D, F, N, K, H, V, T = 32, 48, 4, 2, 8, 96, 30
    layer = D * N * H * 2 + D * K * H * 2 + 3 * D * F
    pairs = T * (T + 1) // 2
    windowed = 24 * 25 // 2 + 6 * 24
    want = 2 * 2 * layer * T + 4 * N * H * (pairs + windowed) + 2 * V * D
    assert roofline.prefill_flops(random_program(tiny_config(windows=(24, None))), T) == want
    experts = 2 * 2 * layer * T - 2 * 3 * D * F * T + 2 * T * (D * 4 + 2 * 3 * D * 24)
    want = experts + 4 * N * H * 2 * pairs + 2 * V * D
    assert roofline.prefill_flops(random_program(tiny_config(windows=(), moe=tiny_moe())), T) == want


@pytest.mark.parametrize(
    "kind, dtype, bandwidth, flops",
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 3.35e12, 989e12),
        ("NVIDIA H200", "float32", 4.8e12, 494e12),
        ("NVIDIA A100-SXM4-40GB", "float16", 1.555e12, 312e12),
        ("TPU v5 lite", "bfloat16", 0.819e12, 197e12),
        ("TPU v5e", "bfloat16", 0.819e12, 197e12),
        ("TPU v5p", "bfloat16", 2.765e12, 459e12),
        ("TPU v5", "bfloat16", 2.765e12, 459e12),
        ("TPU v6 lite", "float32", 1.64e12, 918e12),
        ("TPU7x", "bfloat16", 3.69e12, 1154e12),
    ],
)
def test_known_devices_have_published_limits(monkeypatch, kind, dtype, bandwidth, flops):
    monkeypatch.setattr(roofline.jax, "devices", lambda: [type("Device", (), {"device_kind": kind})])
    assert roofline.machine.__wrapped__(dtype) == roofline.Machine(kind, bandwidth, flops, dtype, "published")


def test_other_devices_are_measured(monkeypatch):
    monkeypatch.setattr(roofline, "_ARRAY", 1 << 24)
    monkeypatch.setattr(roofline, "_SIDE", 256)
    found = roofline.machine.__wrapped__("float32")
    assert found.source == "measured" and 1e8 < found.bandwidth < 1e13 and 1e8 < found.flops < 1e16
    assert f"{found.bandwidth / 1e9:.0f} GB/s" in found.describe() and "(measured)" in found.describe()


def test_all_that_a_round_runs_is_compiled_before_the_first(tiny, caplog, monkeypatch):
    programs = {"a": tiny, "b": tiny.replace(model=random_program(tiny_config()).model)}
    real, started = speed._one_round, []

    def counted(*args):
        started.append(len(caplog.messages))
        return real(*args)

    monkeypatch.setattr(speed, "_one_round", counted)
    jax.clear_caches()
    with jax.log_compiles():
        speed.measure_speed(programs, [1, 2, 3], new_tokens=5, rounds=1)
    found = [i for i, x in enumerate(caplog.messages) if "XLA compilation of jit(run)" in x or "prefill_chunk" in x]
    assert found and max(found) < started[0]


def test_what_is_on_a_mesh_is_compiled_when_it_is_called(tiny, monkeypatch):
    placed = tiny.replace(model=jax.device_put(tiny.model, jax.devices()[0]))
    monkeypatch.setattr(speed, "_lowered", lambda *_: 1 / 0)
    assert len(speed.measure_speed({"a": placed}, [1, 2, 3], new_tokens=3, rounds=1)["a"]) == 1
    with pytest.raises(ZeroDivisionError):
        speed.measure_speed({"a": tiny}, [1, 2, 3], new_tokens=3, rounds=1)


def test_what_a_decoder_times_is_timed_before_anything_compiles(tiny, monkeypatch):
    """Speculation measures a check's cost in `prepare`, once, and keeps it."""
    seen = []
    real, prepare = speed._lowered, type(tiny.decoder).prepare
    monkeypatch.setattr(speed, "_lowered", lambda *args: (seen.append("lowered"), real(*args))[1])
    monkeypatch.setattr(type(tiny.decoder), "prepare", lambda *args: (seen.append("prepared"), prepare(*args))[1])
    speed.measure_speed({"a": tiny, "b": tiny}, [1, 2, 3], new_tokens=3, rounds=1)
    assert seen[:4] == ["prepared", "prepared", "lowered", "lowered"]
