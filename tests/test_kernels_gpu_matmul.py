"""The GPU's quantized product with no GPU: its threads run on NumPy arrays, and it is lowered as it stands."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from kernel_cases import case_of

from pallas_kernels import gpus, tuning
from pallas_kernels.kernels import kernel
from pallas_kernels.quantized_matmul import gpu, gpu_codes, gpu_registers, gpu_sums, gpu_tile, reference
from pallas_kernels.quantized_matmul.cases import gpu_candidates
from pallas_kernels.quantized_matmul.gpu import prepared
from pallas_kernels.quantized_matmul.gpu_plan import even_outputs, plan_for, resident
from pallas_kernels.tolerance import BOUNDS, relative_error

FLOATS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}
TIMED = kernel("quantized_matmul").gpu_timed
CASES = [case.name for case in kernel("quantized_matmul").tests if "halves" not in case.name]  # the same, to a GPU


@dataclasses.dataclass
class Address:
    """Where in a buffer of bytes each thread points."""

    buffer: np.ndarray
    at: np.ndarray
    most: int = 2  # words of a bank that may be read at once


def _word(value):
    return np.full(128, value, np.uint32) if isinstance(value, int) else value


def _halves(word, letters):
    """Return the two floats of each thread's word `[128, 2]`."""
    return word.astype("<u4").view(np.uint16).reshape(128, 2).view(FLOATS[letters]).astype(np.float32)


def _joined(halves, letters):
    return halves.astype(FLOATS[letters]).view(np.uint16).reshape(-1).view("<u4").astype(np.uint32)


def _chosen(a, mask, bits, table):
    inputs = [_word(v).astype(np.uint32) for v in (a, mask, bits)]
    found = np.zeros(128, np.uint32)
    for i in range(8):
        if table >> i & 1:
            terms = [v if i >> (2 - j) & 1 else ~v for j, v in enumerate(inputs)]
            found |= terms[0] & terms[1] & terms[2]
    return found


def _picked(low, high, selector):
    eight = np.stack([low, high], axis=1).astype("<u4").view(np.uint8).reshape(128, 8)
    order = [selector >> 4 * i & 15 for i in range(4)]
    return np.ascontiguousarray(eight[:, order]).view("<u4").reshape(128).astype(np.uint32)


def _pairwise(op, letters, a, b):
    a, b = _halves(a, letters), _halves(_word(b), letters)
    return _joined(a - b if op == "sub" else a * b, letters)


def _product(letters, sums, left, right):
    """Return what `mma.m16n8k16` does, as the tables of its fragments in NVIDIA's PTX manual have it."""
    thread = np.arange(128)
    warp, row, quarter = thread // 32, thread % 32 // 4, thread % 4
    a, b, d = np.zeros((4, 16, 16)), np.zeros((4, 16, 8)), np.zeros((4, 16, 8))
    for i in range(4):
        for h in (0, 1):
            a[warp, row + 8 * (i % 2), 2 * quarter + h + 8 * (i // 2)] = _halves(left[i], letters)[:, h]
            d[warp, row + 8 * (i // 2), 2 * quarter + i % 2] = sums[i]
            if i < 2:
                b[warp, 2 * quarter + h + 8 * i, row] = _halves(right[i], letters)[:, h]
    d += a @ b
    return [d[warp, row + 8 * (i // 2), 2 * quarter + i % 2].astype(np.float32) for i in range(4)]


def _onward(address, by):
    return dataclasses.replace(address, at=address.at + (by if isinstance(by, int) else by.astype(np.int32)))


def _bytes(address, size):
    assert (address.at % size == 0).all() and (address.at >= 0).all()
    return np.ascontiguousarray(address.buffer[address.at[:, None] + np.arange(size)])


def _several(address, count):
    """Return words as a warp reads them, 128 bytes at once, of as many lines of the banks as may be."""
    together = 32 // count
    for first in range(0, 128, together):
        starts = np.unique(address.at[first : first + together] // 4)
        banks = (starts[:, None] + np.arange(count)).reshape(-1) % 32
        assert np.bincount(banks).max() <= address.most
    found = _bytes(address, 4 * count).view("<u4").astype(np.uint32)
    return [found[:, i] for i in range(count)]


def _read(address, size):
    kind = np.float32 if size == 4 else ml_dtypes.bfloat16
    return _bytes(address, size).view(kind).reshape(128).astype(np.float32)


def _write(address, value, size, letters, wanted):
    kind = np.float32 if size == 4 else FLOATS[letters]
    data = value.astype(kind).reshape(128, 1).view(np.uint8)
    for thread in np.flatnonzero(wanted):
        at = address.at[thread]
        assert at >= 0 and not address.buffer.written[at], "written twice"
        address.buffer.written[at] = True
        address.buffer[at : at + size] = data[thread]


def _keep(address, value):
    address.buffer[address.at[:, None] + np.arange(4)] = value.astype("<f4").reshape(128, 1).view(np.uint8)


def _kept_by(block, address):
    return _read(Address(CLUSTER[block].view(np.uint8), address.at), 4)


CLUSTER: list[np.ndarray] = []  # what each block has left


class Written(np.ndarray):
    """Bytes that know which of them were written."""


def _pointer(ref):
    flat = ref.reshape(-1).view(np.uint8)
    if isinstance(ref, Written):
        flat.written = ref.written
    return Address(flat, np.zeros(128, np.int64), 1 if ref.ndim > 3 else 2)


MACHINE = types.SimpleNamespace(
    number=_word,
    real=lambda value: np.full(128, value, np.float32),
    thread=lambda: np.arange(128, dtype=np.uint32),
    add=lambda a, b: a + _word(b),
    times=lambda a, by: a * np.uint32(by),
    both=lambda a, b: a & _word(b),
    either=lambda a, b: a | b,
    differ=lambda a, b: a ^ _word(b),
    right=lambda a, by: a >> np.uint32(by) if by >= 0 else a << np.uint32(-by),
    quotient=lambda a, by: a // np.uint32(by),
    remainder=lambda a, by: a % np.uint32(by),
    less=lambda a, b: (a.astype(np.int32) < b).astype(np.uint32),
    chosen=_chosen,
    picked=_picked,
    pairwise=_pairwise,
    fma=lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    plus=lambda a, b: a + b,
    product=_product,
    keep=_keep,
    kept_by=_kept_by,
    pointer=_pointer,
    width=lambda ref: ref.dtype.itemsize,
    onward=_onward,
    several=_several,
    read=_read,
    write=_write,
)


def _part(array, start, shape):
    """Return what a copy brings: zeros past the end."""
    found = np.zeros(shape, array.dtype)
    inside = array[tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]
    found[tuple(slice(n) for n in inside.shape)] = inside
    return found


def _swizzled(lines):
    """Return lines of 128 bytes `[..., rows, bytes]` as a copy lays them: chunk c of row r at c ^ r % 8."""
    data = np.ascontiguousarray(lines).view(np.uint8).reshape(*lines.shape[:-1], 8, 16)
    found = np.empty_like(data)
    for row in range(lines.shape[-2]):
        found[..., row, np.arange(8) ^ row % 8, :] = data[..., row, :, :]
    return found


def _run(plan, x, values, scales, out):
    """Run every block of a product on NumPy arrays, as `gpu._call` has them."""
    tile = plan.tile
    shape = out.shape[1:]
    for block in range(-(-values.shape[0] // tile.outputs)):
        CLUSTER[:] = [np.full(max(plan.left, 1), np.nan, np.float32) for _ in range(plan.splits)]
        for split in range(plan.splits):
            start, first = block * tile.outputs, split * plan.each
            widths = {"scale": tile.outputs, "offset": tile.outputs, "step": tile.row_of_steps}

            def taken(group, start=start, widths=widths):
                return {
                    name: _part(array, (group, 0 if name == "step" else start), (tile.groups, widths[name]))
                    for name, array in scales.items()
                }

            sums = [np.zeros(128, np.float32)] * tile.carried
            for at in range(first, min(first + plan.each, plan.steps)):
                lines = [
                    _part(values.view(np.uint8), (start, (at * tile.lines + i) * 128), (tile.outputs, 128))
                    for i in range(tile.lines)
                ]
                inputs = _part(x, (0, at * tile.inputs), (tile.rows, tile.inputs))
                inputs = inputs.reshape(tile.rows, -1, 64).transpose(1, 0, 2).reshape(-1, 64)
                here = {} if tile.whole else taken(at * tile.lines * 8 // tile.group)
                sums = gpu_registers.multiply(tile, sums, _swizzled(np.stack(lines)), _swizzled(inputs), here)
            if tile.whole:
                zeros = [np.zeros(128, np.float32)] * tile.sums
                sums = gpu_sums.scaled(tile, gpu_tile.Lane(tile), zeros, sums, taken(0), 0)
            if plan.left:
                gpu_sums.leave(tile, sums, CLUSTER[split])
            else:
                gpu_sums.store(tile, sums, out, _word(split * shape[0]), _word(start), shape)
        for split in range(plan.splits if plan.left else 0):
            blocks, row = (plan.splits, 0) if plan.cluster else (1, split * shape[0])
            where = _word(split), CLUSTER[split], out, _word(row), _word(start), shape
            gpu_sums.gather(tile, blocks, *where)


@pytest.mark.parametrize("name", CASES)
def test_threads(name, monkeypatch):
    _, case = case_of("quantized_matmul", name)
    _check(case.narrowed(), {"splits": 1}, monkeypatch)


BLOCKS = [
    {"splits": 2}, {"splits": 2, "cluster": 1}, {"splits": 2, "outputs": 64, "lines": 1, "deep": 4, "cluster": 1},
    {"splits": 3, "outputs": 64, "lines": 2, "deep": 4}, {"splits": 1, "outputs": 16, "lines": 4, "deep": 4},
]  # fmt: skip
SHARED = ["int8_rows", "int4_groups_32", "int4_outlier_bf16", "uint4_offset_whole", "w4a8_groups_64"]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", SHARED)
def test_inputs_split_over_blocks(name, blocks, monkeypatch):
    _, case = case_of("quantized_matmul", name)
    _check(case.narrowed(), blocks, monkeypatch)


@pytest.mark.parametrize("entry", tuning.table("quantized_matmul_gpu"), ids=lambda entry: entry["case"])
def test_threads_of_the_tables_blocks(entry, monkeypatch):
    name = "int4_groups_128" if entry["case"].startswith("w4") else "int8"
    _, case = case_of("quantized_matmul", name)
    _check(case.narrowed(), entry["blocks"], monkeypatch)


@pytest.mark.parametrize("name", ["int8_odd", "fp8_bits", "int4_groups_64", "uint4_offset", "w4a8_groups_64"])
def test_threads_of_float16_and_other_blocks(name, monkeypatch):
    _, case = case_of("quantized_matmul", name)
    case = case.narrowed()
    x = case.shapes["x"]
    case = dataclasses.replace(case, shapes={**case.shapes, "x": jax.ShapeDtypeStruct(x.shape, jnp.float16)})
    _check(case, {"outputs": 64, "lines": 2, "deep": 1, "splits": 1}, monkeypatch)


def _check(case, blocks, monkeypatch):
    inputs = {name: jnp.asarray(v) for name, v in case.inputs().items()}
    options = dict(case.options)
    x, values, scale = inputs["x"], inputs["values"], inputs["scale"]
    offset = inputs.get("offset")
    activations = options.get("activations")
    plan = plan_for(x, values, scale, options["qtype"], offset is not None, activations, blocks, gpus.GPUS["h100"])
    given, scales = prepared(plan.tile, x, scale, offset)
    M, O = x.shape[0], values.shape[0]
    out = np.full((plan.parts, M, O), np.nan, FLOATS[plan.tile.letters] if plan.parts == 1 else np.float32)
    out = out.view(Written)
    out.written = np.zeros(out.nbytes, bool)
    for module in (gpu_codes, gpu_registers, gpu_sums, gpu_tile):
        monkeypatch.setattr(module, "words", MACHINE)
    _run(plan, np.asarray(given), np.asarray(values), {k: np.asarray(v) for k, v in scales.items()}, out)
    found = np.asarray(out, np.float32).sum(axis=0)
    expected = reference(**{**inputs, "x": x.astype(jnp.float32)}, **options)
    assert relative_error(found, expected) <= BOUNDS["bfloat16"] / 2


@pytest.mark.parametrize("case", TIMED[::5], ids=lambda case: case.name)
def test_lowered(case):
    run = jax.jit(lambda inputs: gpu(**inputs, **case.options))
    with gpus.assume("h100"):
        text = run.trace(dict(case.shapes)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("case", [case for case in TIMED if case.shapes["x"].shape[0] < 64], ids=lambda case: case.name)
def test_blocks_fit(case, monkeypatch):
    """Three blocks a processor at least, where the table has none that were measured, and every block to try once."""
    monkeypatch.setattr(tuning, "gpu_blocks", lambda *_: {})
    x, values, scale = (case.shapes[name] for name in ("x", "values", "scale"))
    h100 = gpus.GPUS["h100"]
    options = case.options["qtype"], False, case.options.get("activations")
    plan = plan_for(x, values, scale, *options, None, h100)
    fit = resident(plan, h100)
    blocks = plan.splits * -(-values.shape[0] // plan.tile.outputs)
    assert fit >= 3 and blocks >= h100.processors
    assert plan.splits == 1 or blocks <= fit * h100.processors
    for candidate in gpu_candidates(case):
        if "rows" not in candidate:
            plan_for(x, values, scale, *options, candidate, h100)


def test_outputs_are_divided_evenly():
    h100 = gpus.GPUS["h100"]
    blocks = {O: -(-O // even_outputs(O, h100)) for O in (4096, 6144, 14336, 28672)}
    assert blocks == {4096: 128, 6144: 128, 14336: 128, 28672: 256} and even_outputs(100, h100) == 16


def test_blocks_of_the_table_that_do_not_fit_are_not_taken():
    """Such as those for scales of groups of 128, of which a step has whole 128 bytes, with larger groups."""
    h100, plans = gpus.GPUS["h100"], {}
    for group in (128, 256):
        x, values = jax.ShapeDtypeStruct((8, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((14336, 2048), jnp.int8)
        shapes = x, values, jax.ShapeDtypeStruct((4096 // group, 14336), jnp.bfloat16)
        plans[group] = plan_for(*shapes, "int4", False, None, None, h100)
    assert plans[128].tile.outputs == 112 and plans[256].tile.outputs == 128
    blocks = {"outputs": 112, "lines": 2, "deep": 4, "splits": 1}
    with pytest.raises(ValueError, match="448 bytes of scales a step, must be whole 128"):
        plan_for(*shapes, "int4", False, None, blocks, h100)


def test_refused():
    x, values, scale = jnp.zeros((3, 128), jnp.bfloat16), jnp.zeros((8, 128), jnp.int8), jnp.ones((1, 8))
    with pytest.raises(NotImplementedError, match="float32"):
        gpu(x.astype(jnp.float32), values, scale, qtype="int8")
    with pytest.raises(NotImplementedError, match="groups of 8"):
        gpu(x, values, jnp.ones((16, 8)), qtype="int8")
    with pytest.raises(NotImplementedError, match="groups of 192"):
        gpu(jnp.zeros((3, 384), jnp.bfloat16), jnp.zeros((8, 384), jnp.int8), jnp.ones((2, 8)), qtype="int8")
    with pytest.raises(ValueError, match="shared memory"):
        gpu(x.repeat(64, 1), values.repeat(64, 1), scale, qtype="int8", blocks={"lines": 4, "stages": 8, "splits": 1})
    with pytest.raises(ValueError, match="lines and deep"):
        gpu(x, values, scale, qtype="int8", blocks={"lines": 3})
