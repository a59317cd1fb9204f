"""The GPU's quantized product of many rows, with no GPU: its threads on NumPy arrays, and its warpgroups emulated."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import case_of, check
from mosaic_emulator import emulated
from test_kernels_gpu_matmul import FLOATS, MACHINE, _halves, _joined
from test_kernels_gpu_warps import WORDS, laid

from pallas_kernels import gpus, tuning
from pallas_kernels.kernels import kernel
from pallas_kernels.quantized_matmul import gpu, gpu_codes, gpu_many, gpu_many_codes
from pallas_kernels.quantized_matmul.cases import gpu_candidates
from pallas_kernels.quantized_matmul.gpu_many_plan import PART, Plan, plan_for
from pallas_kernels.quantized_matmul.reference import dequantize

TIMED = kernel("quantized_matmul").gpu_timed
CASES = [case.name for case in kernel("quantized_matmul").gpu_tests]
H100 = gpus.GPUS["h100"]


def _pair(letters, low, high):
    return _joined(np.stack([low, high], axis=1), letters)


def _pair_fma(letters, a, b, c):
    a, b, c = (_halves(x, letters) for x in (a, b, c))
    return _joined((a.astype(np.float64) * b + c).astype(np.float32), letters)


WORDS_OF_MANY = types.SimpleNamespace(
    **vars(MACHINE)
    | {
        "pair": _pair,
        "pair_fma": _pair_fma,
        "unpaired": lambda letters, word: tuple(_halves(word, letters).T),
        "as_float": WORDS.as_float,
        "as_word": WORDS.as_word,
    }
)


def _plan(case, blocks=None):
    shapes = case.shapes
    given = shapes["x"], shapes["values"], shapes["scale"], case.options["qtype"], shapes.get("offset")
    return plan_for(*given, blocks or case.gpu_blocks or {}, H100)


def _grids(plan, inputs, step):
    """Return the scales and offsets that are copied with a step, and zeros past the outputs' end."""
    first = step * plan.inputs // plan.group
    found = []
    for name in () if plan.whole else ("scale", "offset"):
        if name in inputs:
            grid = np.asarray(inputs[name])[first : first + plan.scales]
            found.append(np.pad(grid, ((0, 0), (0, -plan.O % plan.outputs))))
    return found


@pytest.mark.parametrize("letters", ["bf16", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_threads_hold_the_weights_that_x_is_ordered_for(name, letters, monkeypatch):
    for module in (gpu_codes, gpu_many_codes):
        monkeypatch.setattr(module, "words", WORDS_OF_MANY)
    _, case = case_of("quantized_matmul", name)
    x = jax.ShapeDtypeStruct(case.shapes["x"].shape, FLOATS[letters])
    case = dataclasses.replace(case, shapes={**case.shapes, "x": x})
    inputs, plan = jax.tree.map(jnp.asarray, case.inputs()), _plan(case)
    values = np.asarray(inputs["values"]).view(np.uint8)
    values = np.pad(values, ((0, -plan.O % plan.outputs), (0, 0)))
    scale = jnp.ones((1, plan.O)) if plan.whole else inputs["scale"]
    wanted = np.asarray(dequantize(inputs["values"], scale, inputs.get("offset"), plan.qtype))
    wanted = np.asarray(gpu_many.ordered(plan, jnp.asarray(wanted)))
    outputs = plan.strips * 64
    thread = np.arange(128)
    warp, row, quarter = thread // 32, thread % 32 // 4, thread % 4
    for step in range(plan.steps):
        grids = _grids(plan, inputs, step)
        for block, group, part in np.ndindex(-(-plan.O // plan.outputs), plan.groups, plan.planes):
            start = block * plan.outputs
            own = slice(start + group * outputs, start + (group + 1) * outputs)
            here = [np.ascontiguousarray(grid[:, start : start + plan.outputs]) for grid in grids]
            bytes_ = laid(values[own, step * 64 : (step + 1) * 64], 64)
            held = gpu_many_codes.words_of(plan, bytes_, here, np.full(128, group, np.uint32), part)
            assert len(held) == plan.held
            found = np.full((outputs, PART), np.nan)
            for (strip, eight, half), word in gpu_many_codes.pairs(plan, held).items():
                for e in (0, 1):
                    at = strip * 64 + warp * 16 + row + 8 * half, 8 * eight + 2 * quarter + e
                    found[at] = _halves(word, letters)[:, e]
            first = step * plan.inputs + part * PART
            expected = wanted[own, first : first + PART]
            rounding = 2.0**-11 if letters == "f16" else 2.0**-8
            np.testing.assert_allclose(found[: len(expected)], expected, rtol=rounding, atol=rounding * 1e-2)


def _floats(plan, weight, grids, group, part):
    """Return what a warpgroup makes of codes, by the plain formula."""
    codes = np.asarray(weight.read())
    own = slice(int(group) * len(codes), (int(group) + 1) * len(codes))
    grids = [np.asarray(grid.read()).astype(np.float32)[:, own] for grid in grids]
    scale = np.ones((1, len(codes)), np.float32) if plan.whole else grids[0]
    offset = jnp.asarray(grids[1]) if plan.offset else None
    wide = gpu_many.ordered(plan, dequantize(jnp.asarray(codes), jnp.asarray(scale), offset, plan.qtype))
    return np.asarray(wide[:, part * PART : (part + 1) * PART].astype(jnp.bfloat16))


@pytest.mark.parametrize("name", CASES)
def test_emulated_warpgroups_find_what_the_reference_does(name, monkeypatch):
    found, case = case_of("quantized_matmul", name)
    monkeypatch.setattr(gpu_many_codes, "taken", _floats)
    monkeypatch.setattr(gpu_many_codes, "floats", lambda plan, held: held)
    with emulated(gpu_many, gpu_many):
        check(found, case.narrowed(), False, gpu=True)


def test_a_step_that_nobody_waits_for_is_found(monkeypatch):
    """The check can fail: what has not landed is NaN."""
    found, case = case_of("quantized_matmul", "many_int4_groups_128")
    monkeypatch.setattr(gpu_many_codes, "taken", _floats)
    monkeypatch.setattr(gpu_many_codes, "floats", lambda plan, held: held)
    with emulated(gpu_many, gpu_many):
        monkeypatch.setattr(gpu_many.plgpu, "barrier_wait", lambda barrier: None)
        with pytest.raises(AssertionError):
            check(found, case.narrowed(), False, gpu=True)


@pytest.mark.parametrize(("M", "O"), [(300, 320), (2500, 640), (65, 64)])
def test_every_block_has_a_place(M, O):
    x, values = jax.ShapeDtypeStruct((M, 128), jnp.bfloat16), jax.ShapeDtypeStruct((O, 128), jnp.int8)
    plan: Plan = plan_for(x, values, jax.ShapeDtypeStruct((1, O), jnp.bfloat16), "int8", None, {}, H100)
    rows, outputs = plan.tiles
    places = {tuple(int(x) for x in plan.at(jnp.int32(i))) for i in range(rows * outputs)}
    assert places == {(r, o) for r in range(rows) for o in range(outputs)}


@pytest.mark.parametrize(("O", "outputs"), [(64, 64), (192, 128)])
def test_a_block_is_no_wider_than_one_strip_of_outputs(O, outputs):
    """Mosaic drops an axis of one tile from its copies: a second strip would be written over the first."""
    x, values = jax.ShapeDtypeStruct((65, 128), jnp.bfloat16), jax.ShapeDtypeStruct((O, 128), jnp.int8)
    plan = plan_for(x, values, jax.ShapeDtypeStruct((1, O), jnp.bfloat16), "int8", None, {"outputs": 128}, H100)
    assert plan.outputs == outputs


@pytest.mark.parametrize(("splits", "found"), [(1, 1), (2, 2), (4, 3), (9, 5)])
def test_every_split_has_a_step(splits, found):
    """Of five: four splits of two each would leave the last one none, which it would wait for."""
    x, values = jax.ShapeDtypeStruct((65, 320), jnp.bfloat16), jax.ShapeDtypeStruct((64, 320), jnp.int8)
    scale = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    plan = plan_for(x, values, scale, "int8", None, {"splits": splits}, H100)
    assert plan.splits == found and plan.each * (found - 1) < plan.steps <= plan.each * found


@pytest.mark.parametrize("name", CASES[::3])
def test_lowered(name):
    _, case = case_of("quantized_matmul", name)
    run = jax.jit(lambda inputs: gpu(**inputs, **case.options, blocks=case.gpu_blocks))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(case.shapes))
    with gpus.assume("h100"):
        text = run.trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize(
    "case", [case for case in TIMED if case.shapes["x"].shape[0] >= 64], ids=lambda case: case.name
)
def test_blocks_fit(case):
    """Every block to try does, and by default most processors have one."""
    for blocks in gpu_candidates(case):
        if "rows" in blocks:
            _plan(case, blocks)
    plan = _plan(case, {"rows": 64} if case.shapes["x"].shape[0] == 64 else {})
    rows, outputs = plan.tiles
    assert rows * outputs * plan.splits > H100.processors // 2


def test_few_rows_are_its_own_where_the_table_says_so(monkeypatch):
    """And the other kernel's where what the table has of a near shape does not fit."""
    called = []
    monkeypatch.setattr(gpu_many, "multiply", lambda plan, x, *_: called.append(plan.rows) or x[:, : plan.O])
    monkeypatch.setattr(tuning, "gpu_blocks", lambda *_: {"outputs": 128, "rows": 64, "stages": 4, "splits": 1})
    scale = jax.ShapeDtypeStruct((1, 64), jnp.bfloat16)
    for inputs, wanted in ((128, [64]), (96, [64])):
        x, values = jax.ShapeDtypeStruct((64, inputs), jnp.bfloat16), jax.ShapeDtypeStruct((64, inputs), jnp.int8)
        with gpus.assume("h100"):
            jax.eval_shape(lambda x, v, s: gpu(x, v, s, qtype="int8"), x, values, scale)
        assert called == wanted


def test_refused():
    x, values, scale = jnp.zeros((65, 192), jnp.bfloat16), jnp.zeros((64, 192), jnp.int8), jnp.ones((1, 64))
    with pytest.raises(NotImplementedError, match="192 inputs, 63 outputs: must be multiples of 64 and 64"):
        gpu(x, values[:63], scale[:, :63], qtype="int8")
    with pytest.raises(NotImplementedError, match="groups of 96 inputs: must divide 64"):
        gpu(x, values, jnp.ones((2, 64)), qtype="int8")
    with pytest.raises(NotImplementedError, match="65 rows of integers: at most 64"):
        gpu(x, values, scale, qtype="int8", activations="int8")
    with pytest.raises(ValueError, match="rows a multiple of 64"):
        gpu(x, values, scale, qtype="int8", blocks={"rows": 96})
    with pytest.raises(ValueError, match="bytes of shared memory"):
        gpu(x, values, scale, qtype="int8", blocks={"rows": 128, "stages": 12})
