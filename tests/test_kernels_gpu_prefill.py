"""Prefill attention for a Hopper GPU without one: emulated against the reference, and lowered for CUDA."""

import sys

import jax
import pytest
from kernel_cases import case_of, check
from mosaic_emulator import emulated

from pallas_kernels import gpus
from pallas_kernels.kernels import kernel
from pallas_kernels.prefill_attention import gpu, gpu_attend, gpu_body
from pallas_kernels.prefill_attention.gpu_plan import Plan, together
from pallas_kernels.tolerance import BOUNDS

LAUNCH = sys.modules[gpu.__module__]
CASES = (
    "odd_63", "odd_60_h80", "odd_130_h96", "gqa_8_h128", "chunk", "empty_rows", "part_window", "window_sinks", "ragged",
    "sparse_128", "bf16", "int8", "fp8",
)  # fmt: skip
KINDS = ("gqa_8_h128", "h256", "chunk", "window_sinks", "ragged_window", "sparse_128")


PACKED = tuple(
    case.name for case in (*kernel("kivi_prefill_attention").tests, *kernel("kivi_prefill_attention").gpu_tests)
)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("prefill_attention", name) for name in CASES] + [("kivi_prefill_attention", name) for name in PACKED],
)
def test_emulated_kernel_is_the_reference(kind, name):
    found, case = case_of(kind, name)
    # The log-sum-exp of keys that are unpacked is that of numbers rounded to bfloat16.
    bounds = BOUNDS | ({"float32": 5e-4} if kind == "kivi_prefill_attention" else {})
    with emulated(LAUNCH, gpu_body, gpu_attend):
        check(found, case.narrowed(), False, gpu=True, bounds=bounds)


def test_a_barrier_that_nobody_waits_for_is_found(monkeypatch):
    """The check can fail: a weight times a value that has not landed is NaN."""
    found, case = case_of("prefill_attention", "chunk")
    with emulated(LAUNCH, gpu_body, gpu_attend):
        monkeypatch.setattr(gpu_attend.plgpu, "barrier_wait", lambda barrier: None)
        with pytest.raises(AssertionError):
            check(found, case.narrowed(), False, gpu=True)


@pytest.mark.parametrize("name", KINDS)
def test_lowers_for_cuda(name):
    found, case = case_of("prefill_attention", name)
    case = case.narrowed()
    run = jax.jit(lambda inputs: found.gpu(**inputs, **case.options, blocks=case.gpu_blocks))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(case.shapes))
    with gpus.assume("h100"):
        text = run.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("processors", [1, 3, 7, 60])
def test_processors_share_the_tiles(processors):
    plan = Plan(B=2, T=300, S=300, N=8, K=2, queries=128, slots=128, window=None, sinks=0, ragged=False,
                together=2, processors=processors)  # fmt: skip
    tiles = [
        int(plan.tile(processor, turn)) for processor in range(processors) for turn in range(int(plan.tiles(processor)))
    ]
    assert sorted(tiles) == list(range(2 * 8 * 3))
    places = {tuple(int(x) for x in plan.at(tile)) for tile in tiles}
    assert places == {(b, head, i) for b in range(2) for head in range(8) for i in range(3)}
    assert int(plan.at(0)[2]) == 2  # the longest first


def test_key_heads_run_together_as_the_cache_allows():
    assert together(8, 512, 16384) == 4
    assert together(32, 512, 4096) == 16
    assert together(3, 512, 2**20) == 1


def test_refuses_what_it_cannot():
    found, case = case_of("prefill_attention", "sparse")
    with pytest.raises(NotImplementedError, match="must be multiples of 128 queries"):
        check(found, case.narrowed(), False, gpu=True)
    q, cache = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((1, 16, 1, 320), (1, 1, 16, 320)))
    with pytest.raises(NotImplementedError, match="H=320: must be at most 256"):
        jax.eval_shape(lambda q, k: gpu(q, k, k, scale=1.0), q, cache)


def test_refuses_float32():
    found, case = case_of("prefill_attention", "chunk")
    with pytest.raises(NotImplementedError, match="bfloat16"):
        check(found, case, False, gpu=True)


def test_refuses_blocks_beyond_shared_memory():
    found, case = case_of("prefill_attention", "bf16")
    blocks = {"queries": 128, "slots": 128, "stages": 8, "processors": 0}
    with pytest.raises(ValueError, match="shared memory"):
        found.gpu(**case.inputs(), **case.options, blocks=blocks)
