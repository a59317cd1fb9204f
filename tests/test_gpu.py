"""What runs on a GPU, as far as that shows with none: which programs hold the kernels, and how they would be timed."""

import dataclasses
import functools
import json
from types import SimpleNamespace

import bench_kernels
import jax
import jax.numpy as jnp
import numpy as np
import profile_gpu_step
import pytest
from command import ROOT, TINY, caller

from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.packed_attention import packed_attention
from jaxinfer.cache.paged import Paged
from jaxinfer.eval import bench
from jaxinfer.eval.bench import Limits, Workload
from jaxinfer.ops.attention import attention, visible
from jaxinfer.ops.cudnn_attention import on_cudnn
from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.einsum_integer import einsum_int4_int8, einsum_int8
from jaxinfer.ops.implementation import describe
from jaxinfer.passes.quantization.rounding import round_to_nearest
from pallas_kernels import gpu_bench, gpu_measure, gpus, rms_norm, targets, tuning
from pallas_kernels.case import Peer
from pallas_kernels.decode_attention import gpu_rows
from pallas_kernels.kernels import ON_GPUS, kernel

CALL = "mosaic_gpu_v2"
# The cases of the README's tables.
SHOWN = (
    "g4_b1_s8192,g4_b4_s8192,g4_b16_s8192,g4_b64_s8192,g4_b1_s32768,g4_b16_s32768,g4_b1_s8192_int8,g4_b4_s8192_int8,"
    "g4_b16_s8192_int8,g4_b64_s8192_int8,g4_b16_s8192_fp8,g4_b1_s8192_p64,g4_b16_s8192_p64,g4_b64_s8192_p64,"
    "g4_b1_s8192_p16,g4_b16_s8192_p16,g4_b16_s8192_p64_int8,gpu_s4096,gpu_s8192,gpu_s16384,gpu_s8192_window,"
    "gpu_t512_s8192,gpu_s8192_sparse,w8a16_m1_i4096_o14336,w8a16_m8_i4096_o14336,w8a16_m16_i4096_o14336,"
    "w4a16_m1_i4096_o14336,w4a16_m8_i4096_o14336,w4a16_m16_i4096_o14336,w8a16_m1_i14336_o4096,w8a16_m8_i14336_o4096,"
    "w8a16_m16_i14336_o4096,w4a16_m1_i14336_o4096,w4a16_m8_i14336_o4096,w4a16_m16_i14336_o4096,"
    "fp8a16_m1_i4096_o14336,w8a8_m1_i4096_o14336,w8a8_m16_i4096_o14336"
)
TUNED = "w4a16_m8_i4096_o14336,w4a16_m16_i4096_o14336,w4a16_m1_i14336_o4096"


def lowered(fn, *args) -> str:
    """Return what a function becomes for an H100, before XLA compiles it."""
    with gpus.assume("h100"):
        return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_gpu_is_known_by_its_kind_and_by_what_is_assumed():
    assert gpus.of_kind("NVIDIA H100 80GB HBM3").name == "h100" and gpus.of_kind("NVIDIA H200").name == "h200"
    assert gpus.of_kind("NVIDIA A100-SXM4-80GB") is None
    assert gpus.target() is None and targets.platform() is None and gpus.current().name == "h100"
    with gpus.assume("h200"):
        assert targets.platform() == "cuda" and gpus.target().name == "h200" and "Hopper GPU" in describe()
    with pytest.raises(ValueError, match="gpu='a100': must be one of h100, h200"):
        gpus.assume("a100")
    with pytest.raises(NotImplementedError, match="rms_norm: has no kernel for TPUs"):
        targets.kernel(rms_norm)


@pytest.mark.parametrize(("qtype", "group"), [("int8", None), ("int4", 128), ("uint4", 32)])
def test_products_with_quantized_weights_are_the_kernels(qtype, group):
    weight = round_to_nearest(jnp.ones((256, 512), jnp.float32), 1, qtype, group)
    product = functools.partial(einsum, "btd,fd->btf")
    assert CALL in lowered(product, struct(2, 3, 512), weight)
    assert CALL not in lowered(product, struct(2, 3, 512, dtype=jnp.float32), weight)  # its units are of 16 bits
    assert CALL not in lowered(product, struct(2, 40, 512), weight)  # many rows are XLA's, unless another is named
    assert CALL in lowered(functools.partial(product, implementation="pallas"), struct(2, 40, 512), weight)


def test_products_of_integers_are_the_kernels():
    x = struct(1, 1, 512)
    int8, int4 = (round_to_nearest(jnp.ones((256, 512), jnp.float32), 1, *how) for how in (("int8",), ("int4", 128)))
    product = functools.partial(einsum_int8, "btd,fd->btf")
    assert CALL in lowered(functools.partial(product, group=128), x, int8)
    assert CALL in lowered(functools.partial(product, implementation="pallas"), x, int8)
    assert CALL not in lowered(product, x, int8)  # XLA's own is faster with one scale a row
    assert CALL in lowered(functools.partial(einsum_int4_int8, "btd,fd->btf"), x, int4)


@pytest.mark.parametrize(
    ("tokens", "dtype", "held"), [(1, jnp.bfloat16, True), (256, jnp.bfloat16, True), (1, jnp.float32, False)]
)
def test_attention_is_a_kernel_for_few_tokens_and_for_many(tokens, dtype, held):
    q, cache = struct(1, tokens, 8, 128, dtype=dtype), struct(1, 2, 512, 128, dtype=dtype)
    text = lowered(functools.partial(attention, scale=0.1), q, cache, cache, struct(1, tokens, dtype=jnp.int32))
    assert (CALL in text) == held


def test_prompts_for_cudnn_are_masked_as_they_are_for_xla(monkeypatch):
    """With XLA's own attention in cuDNN's place; what a slot holds that no query sees is never used."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((2, 12, 4, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    )
    k, v = (x.at[:, :, 33:].set(jnp.nan) for x in (k, v))
    positions = jnp.asarray([[*range(20, 32)], [*range(3, 10), *[-1] * 5]])
    real, called = jax.nn.dot_product_attention, []

    def instead(*args, implementation, **options):
        called.append(implementation)
        return real(*args, implementation="xla", **options)

    for window in (None, 7):
        options = dict(scale=0.3, window=window)
        expected = attention(q, k, v, positions, implementation="xla", **options)
        with monkeypatch.context() as patch:
            patch.setattr(jax.nn, "dot_product_attention", instead)
            patch.setattr(jax, "default_backend", lambda: "gpu")
            patch.setattr(jax.lax, "platform_dependent", lambda *x, cuda, default: cuda(*x))
            found = on_cudnn(attention, visible, q, k, v, positions, **options)
        there = np.asarray(positions >= 0)
        error = np.abs(np.asarray(found - expected, np.float32))[there]
        assert error.max() < 0.03 and np.isfinite(np.asarray(found, np.float32)).all()
    assert called == ["cudnn", "cudnn"]


@pytest.mark.parametrize("tokens", [1, 4, 256])
@pytest.mark.parametrize("options", [{}, {"page": 64}, {"group": 64, "residual": 32}], ids=str)
def test_attention_over_packed_groups_is_a_kernel(tokens, options):
    layer = jax.eval_shape(lambda: Kivi(**options).create(2, 1024, 2, 128, jnp.bfloat16))
    attend = functools.partial(packed_attention, residual=32, scale=0.1, window=None, softcap=None)
    args = struct(2, tokens, 8, 128), layer.groups, struct(2, tokens, dtype=jnp.int32)
    assert CALL in lowered(attend, *args)
    two = jax.eval_shape(lambda: Kivi(bits=2).create(2, 1024, 2, 128, jnp.bfloat16))
    assert CALL not in lowered(attend, args[0], two.groups, args[2])


def test_attention_over_pages_is_a_kernel():
    layer = jax.eval_shape(lambda: Paged(page=64).create(1, 256, 2, 128, jnp.bfloat16))
    step = functools.partial(type(layer).attend, scale=0.1, window=None, softcap=None)
    assert CALL in lowered(step, layer, struct(1, 1, 8, 128), struct(1, 1, dtype=jnp.int32))


def test_a_case_is_checked_by_its_reference_and_timed_in_a_loop(monkeypatch):
    """With the references in the kernels' place, which a CPU can run."""
    monkeypatch.setattr(gpu_measure, "_CACHED", 1e5)
    clock = [0.0]
    monkeypatch.setattr(gpu_measure, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    limits = {"copy_bandwidth": 1e9, "flops": 1e9}
    for name, case in (
        ("paged_decode_attention", "bf16"), ("paged_decode_attention", "int8"), ("quantized_matmul", "int8"),
    ):  # fmt: skip
        found = kernel(name)
        case = next(c for c in found.tests if c.name == case)
        same = dataclasses.replace(found, gpu=_without_blocks(found.reference))
        wrong = dataclasses.replace(found, gpu=_twice(same.gpu))
        assert gpu_measure.check(same, case)["ok"] and not gpu_measure.check(wrong, case)["ok"]
        calls = gpu_measure.compile_calls(functools.partial(found.reference, **case.options), case)
        line = gpu_measure.measure(dataclasses.replace(calls, run=_slowly(calls.run, clock)), limits)
        assert np.isclose(line["us"], 5e5 / calls.count / calls.each)  # without the second that a dispatch takes
        assert np.isclose(line["bandwidth_share"] * line["us"], case.bytes / 1e9 * 1e6)


def test_what_a_peer_prepares_is_no_part_of_its_loop():
    case = next(c for c in kernel("quantized_matmul").tests if c.name == "int8")
    peer = Peer(lambda x, values, scale, *, qtype: (x.T, values), lambda x, values: values.astype(x.dtype) @ x)
    job = gpu_bench._peer(kernel("quantized_matmul"), case, "turned", peer)
    calls = gpu_measure.compile_calls(job.run, case, job.prepare)
    assert [x.shape for x in jax.tree.leaves(calls.run.args_info)][:2] == [(96, 1), (60, 96)]
    assert gpu_measure.measure(calls, {"copy_bandwidth": 1e9, "flops": 1e9})["calls"] == calls.count


def _slowly(run, clock):
    def ran(kept, given, turns):
        clock[0] += 1.0 + 0.5 * int(turns)
        return run(kept, given, turns)

    return ran


def _without_blocks(run):
    return lambda blocks=None, **x: run(**x)


def _twice(run):
    return lambda **x: jax.tree.map(lambda y: y + y, run(**x))


def test_the_numbers_that_are_timed_have_no_pattern():
    one, other = (np.asarray(gpu_measure._fill(struct(64, 64, dtype=jnp.float32), seed)) for seed in (0, 1))
    assert abs(one.mean()) < 0.1 and 0.5 < one.std() < 0.65 and abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.1
    codes = np.asarray(gpu_measure._fill(struct(64, 64, dtype=jnp.int8), 3))
    assert len(np.unique(codes)) > 250


def test_nothing_is_timed_after_a_fault_of_the_device(monkeypatch, capsys, tmp_path):
    """A kernel that reads where there is nothing leaves a process that can run no other."""
    found = kernel("rms_norm")
    jobs = [gpu_bench.Timed(found, case, "pallas", lambda **_: 1 / 0) for case in found.timed]
    lines = gpu_bench.times(jobs, {})
    assert "ZeroDivisionError" in next(lines)["error"] and "error" in next(lines)  # the device goes on
    monkeypatch.setattr(gpu_bench, "_lives", lambda: False)
    with pytest.raises(gpu_bench.Faulted, match="rms_norm, m1_d4096_alone, None: the device faulted: division"):
        next(lines)
    monkeypatch.setattr(gpu_bench, "device", dict)
    monkeypatch.setattr(gpu_bench, "timed", lambda *_: jobs)
    monkeypatch.setattr(gpu_measure, "ceilings", dict)
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main(["--gpu", "--no-check", "--out", str(tmp_path / "lines.jsonl")])
    out = capsys.readouterr()
    assert ended.value.code == 1 and "the cases after it were not run" in out.err and "m1_d4096" in out.out


def test_a_table_of_times_has_the_best_blocks_the_limit_and_the_peers():
    line = {"kernel": "k", "case": "c", "bandwidth_share": 0.5, "flops_share": 0.1}
    lines = [
        line | {"implementation": "pallas", "us": 20.0},
        line | {"implementation": "pallas", "us": 10.0, "blocks": {"slots": 64}, "bandwidth_share": 0.9},
        line | {"implementation": "xla", "us": 30.0},
        {"kernel": "k", "case": "d", "implementation": "pallas", "error": "too odd"},
    ]
    text = gpu_bench.table(lines).splitlines()
    assert text[2] == "| k | c | 10.0 us | 90% copy bandwidth | xla 3.00x |" and "too odd" in text[3]


def test_the_fastest_blocks_make_a_table_that_near_shapes_take(tmp_path, monkeypatch):
    line = {"kernel": "decode_attention", "chip": "h100", "implementation": "pallas"}
    lines = [
        line | {"case": "g4_b4_s8192", "us": 20.0},
        line | {"case": "g4_b4_s8192", "us": 10.0, "blocks": {"slots": 128, "stages": 2}},
        line | {"case": "g4_b16_s8192", "us": 30.0},
        line | {"case": "g4_b16_s8192", "us": 29.9, "blocks": {"slots": 128, "stages": 3}},  # not worth it
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning.table.cache_clear()
    bench_kernels.main(["--gpu-blocks", str(tmp_path / "lines.jsonl")])
    (entry,) = json.loads((tmp_path / "decode_attention_gpu.json").read_text())
    assert entry["case"] == "g4_b4_s8192" and entry["class"] | {"heads": 32, "rows": 4, "S": 8192} == entry["class"]
    near, far = entry["class"] | {"S": 16384}, entry["class"] | {"S": 65536}
    assert tuning.gpu_blocks("decode_attention", "h200", near) == {"slots": 128, "stages": 2}
    assert tuning.gpu_blocks("decode_attention", "h100", far) == tuning.gpu_blocks("no_kernel", "h100", near) == {}
    q, cache = struct(4, 1, 32, 128), struct(4, 8, 8192, 128)
    with monkeypatch.context() as patch:
        patch.setattr(gpu_rows, "blocks_for", lambda *_, given=None, **__: pytest.fail(str(_)))
        with pytest.raises(pytest.fail.Exception, match="'slots': 128, 'stages': 2, 'splits': 5"), gpus.assume("h100"):
            attend = functools.partial(kernel("decode_attention").gpu, scale=1.0, blocks={"splits": 5})
            jax.eval_shape(attend, q, cache, cache, struct(4, dtype=jnp.int32))
    tuning.table.cache_clear()


@pytest.mark.parametrize("name", ["decode_attention", "quantized_matmul"])
def test_the_tables_of_blocks_are_of_the_cases_and_lower(name):
    found = kernel(name)
    for entry in tuning.table(f"{name}_gpu"):
        (case,) = (c for c in found.gpu_timed if c.name == entry["case"])
        assert found.gpu_class(**case.shapes, **case.options) == entry["class"]
        assert tuning.gpu_blocks(name, entry["chip"], entry["class"]) == entry["blocks"]
        inputs = jax.tree.map(lambda x: struct(*x.shape, dtype=x.dtype), dict(case.shapes))
        assert CALL in lowered(lambda x, options=case.options: found.gpu(**x, **options), inputs)


def test_the_tables_of_the_readme_are_those_of_the_results(capsys):
    results, readme = ROOT / "benchmarks" / "results", (ROOT / "README.md").read_text()
    for script, name, cases in (
        (bench_kernels, "kernels_h100", SHOWN),
        (bench_kernels, "tune_h100", TUNED),
        (profile_gpu_step, "step_h100", ""),
    ):
        script.main(["--table", str(results / f"{name}.jsonl"), *(["--cases", cases] if cases else [])])
        assert capsys.readouterr().out.strip() in readme
    timed = [json.loads(line) for line in (results / "bench_h100.jsonl").read_text().splitlines()]
    timed = sorted((x for x in timed if "error" not in x), key=lambda x: (x["context"], x["batch"]))
    assert bench.table(timed, "baseline") in readme
    checks = [json.loads(line) for line in (results / "checks_h100.jsonl").read_text().splitlines()]
    assert len(checks) == 127 and sum(x.get("ok", False) for x in checks) == 123
    assert all(x.get("ok") or "unsupported" in x for x in checks)
    ran = {(x["kernel"], x["case"]) for x in checks}
    cases = {(name, case.name) for name in ON_GPUS for case in (*kernel(name).tests, *kernel(name).gpu_tests)}
    assert ran < cases and f"{len(cases - ran)} cases have not run on a GPU" in readme
    lines = [json.loads(line) for line in (results / "emulated_h100.jsonl").read_text().splitlines()]
    assert {(x["kernel"], x["case"]) for x in lines} == cases
    assert all(x.get("right") or "unsupported" in x for x in lines)
    said = " ".join(readme.split())
    for version in ("0.10.2", "0.11.2"):
        right = {(x["kernel"], x["case"]): x["error"] for x in lines if x.get("jax") == version}
        assert f"All {len(right)} cases that the kernels take" in said
        both = [(right[place], x["error"]) for x in checks if (place := (x["kernel"], x["case"])) in right]
        assert f"{sum(a == b for a, b in both)} of {len(both)} are off by the same number" in said


def test_without_a_gpu_the_command_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        bench_kernels.main(["--gpu"])
    assert ended.value.code == 2 and "--gpu: needs a GPU, and JAX has 'cpu'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        profile_gpu_step.main([])
    assert ended.value.code == 2 and "needs a GPU, and JAX has 'cpu'" in capsys.readouterr().err


def test_bench_times_variants_by_batch_and_context(tmp_path, capsys):
    (tmp_path / "passes.txt").write_text("int8\nboth = int4 kv_int8\n")
    run = caller(capsys)
    out = tmp_path / "bench.jsonl"
    status, text, errors = run(
        "bench", "--config", TINY, "--pass-set", tmp_path / "passes.txt", "--batch", "1", "--batch", "2",
        "--context", "16", "--new-tokens", "4", "--rounds", "1", "--out", out,
    )  # fmt: skip
    assert status == 0, errors
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["variant"], r["batch"]) for r in rows] == [
        (name, batch) for batch in (1, 2) for name in ("baseline", "int8", "both")
    ]
    for row in rows:
        assert row["step_ms"] > 0 and row["prefill_tokens_per_second"] > 0 and row["bandwidth_share"] > 0
        assert np.isclose(row["decode_tokens_per_second"], 1e3 * row["batch"] / row["step_ms"])
    assert rows[1]["step_bytes"] < rows[0]["step_bytes"] and "| both | 2 | 16 |" in text
    status, again, _ = run("bench", "--table", out)
    assert status == 0 and again.splitlines() == text.splitlines()[1:]
    out.write_text('{"variant": "a"}\n')
    status, _, errors = run("bench", "--table", out)
    assert status == 2 and f"{out}, line 1: no result of jaxinfer bench" in errors


def test_bench_takes_random_weights_of_a_shape(capsys, monkeypatch):
    from jaxinfer.plan import shapes

    tiny = shapes._llama(300, 64, 1e4, 2, (2, 64, 128, 4))
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    sizes = ("--context", "80", "--new-tokens", "2", "--rounds", "1")
    status, text, errors = caller(capsys)("bench", "tiny", "--random-weights", *sizes)
    assert status == 0 and "| baseline | 1 | 80 |" in text, errors  # beyond the shape's own context of 64


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--context", "100000"), "a context of 100000 and 64 new tokens: the model's context is"),
        (("--batch", "0"), "batch=0: must be 1 or more"),
        (("--random-weights",), "--config: --random-weights takes an architecture by MODEL alone"),
        (("--pass", "int9"), "int9"),
    ],
)
def test_bench_says_what_is_wrong(argv, said, capsys):
    status, _, errors = caller(capsys)("bench", "--config", TINY, *argv)
    assert status == 2 and said in errors and len(errors.strip().splitlines()) == 1


def test_what_does_not_fit_the_device_is_left_out(monkeypatch):
    program = bench.random_program(_tiny_config(), "float32")
    memory = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000})
    monkeypatch.setattr(bench.jax, "devices", lambda: [memory])
    (found,) = bench.bench({"a": program}, [Workload(1, 8)], Limits(1.0, 1.0, "none"))
    assert found[0] == "a" and found[2]["error"].startswith("needs 0 GB of weights and cache, and the device has 0")
    assert "needs 0 GB" in bench.table([{"variant": "a", "batch": 1, "context": 8, **found[2]}], "a")


def _tiny_config():
    from jaxinfer.plan.shapes import _llama

    return _llama(300, 64, 1e4, 2, (2, 64, 128, 4))
