"""The GPU's rotation and append with no GPU: its threads run on NumPy arrays, and which programs hold it."""

import functools
import importlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gpu_grid import run_here
from test_gpu import CALL, lowered, struct
from test_kernels_gpu_matmul import _bytes
from test_kernels_gpu_warps import WORDS

from jaxinfer.cache import rotated
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.ops.rope import RopeConfig, rotate
from pallas_kernels import gpu_measure, gpus, rope_append
from pallas_kernels.decode_attention import gpu_lanes
from pallas_kernels.rope_append import gpu_thread
from pallas_kernels.rope_append.cases import TESTS

append_gpu = importlib.import_module("pallas_kernels.rope_append.gpu")  # the package's `gpu` is its function


def _several(address, count):
    words = _bytes(address, 4 * count).view("<u4")
    return [words[:, i].astype(np.uint32) for i in range(count)]


def _write_part(address, word, size, wanted):
    data = word.astype("<u4").view(np.uint8).reshape(128, 4)[:, :size]
    for thread in np.flatnonzero(wanted):
        assert address.at[thread] % size == 0
        address.buffer[address.at[thread] + np.arange(size)] = data[thread]


def _bytes_of(values, kind):
    held = np.zeros((128, 4), np.uint8)
    for i, value in enumerate(values):
        held[:, i] = value.astype(kind).view(np.uint8)
    return held.view("<u4").reshape(128).astype(np.uint32)


def _machine():
    """Return the instructions of the warps' test, and those that only this kernel has."""
    more = {
        "several": _several,
        "write_part": _write_part,
        "divided": lambda a, b: (a / b).astype(np.float32),
        "within": lambda a, most: np.clip(a, -most, most),
        "signed_bytes": lambda values: _bytes_of([np.rint(v) for v in values], np.int8),
        "eight_bits": lambda values: _bytes_of(values, ml_dtypes.float8_e4m3fn),
    }
    return type(WORDS)(**vars(WORDS) | more)


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_its_threads_write_what_the_reference_does(case, monkeypatch):
    """By the check that a GPU's kernel goes through: its bounds are of what is written, the rest stays as it was."""
    for module in (gpu_lanes, gpu_thread):
        monkeypatch.setattr(module, "words", _machine())
    run_here(monkeypatch, append_gpu)
    inputs = case.inputs()
    arrays = jax.tree.map(jnp.asarray, case.narrowed().inputs())
    expected, kept = rope_append.reference(**arrays, **case.options)
    found, changed = rope_append.gpu(**arrays, **case.options)
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert np.abs(found - expected).max() <= 2**-7 * np.abs(found).max()
    for name, one, other in zip(case.donated, changed, kept, strict=True):
        before, one, other = (np.asarray(x) for x in (inputs[name], one, other))
        assert gpu_measure.is_right(one, other, before), name
        assert not gpu_measure.is_right(before, other, before), name  # something was to be written


ROPE = RopeConfig(kind="yarn", factor=4.0, original_context=32)


def _operands(kind, B, T, H=128, dtype=jnp.bfloat16):
    layer = jax.eval_shape(lambda: kind.create(B, 64, 2, H, dtype))
    q, k, v = (struct(B, T, heads, H, dtype=dtype) for heads in (8, 2, 2))
    return layer, q, k, v, *(struct(*shape, dtype=jnp.int32) for shape in ((B, T), (B,), (B,)))


def _append(layer, q, k, v, positions, start, counts, **options):
    return rotated.append_rotated(layer, q, k, v, positions, ROPE, start, counts, **options)


@pytest.mark.parametrize("kind", [Dense(), QuantizedCache(), QuantizedCache(qtype="float8_e4m3fn")])
def test_programs_hold_it_where_tokens_are_few_and_have_slots(kind):
    assert lowered(_append, *_operands(kind, 2, 3)).count(CALL) == 1
    for more in (_operands(kind, 2, 300), _operands(kind, 2, 1, dtype=jnp.float32), _operands(kind, 2, 1, H=96)):
        assert CALL not in lowered(_append, *more)


def test_a_cache_without_slots_appends_by_itself():
    operands = _operands(Paged(), 2, 1)
    assert CALL not in lowered(_append, *operands)
    with gpus.assume("h100"), pytest.raises(NotImplementedError, match="PagedLayer: has no slots"):
        jax.eval_shape(functools.partial(_append, implementation="pallas"), *operands)


@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_what_xla_and_the_kernels_reference_write_is_the_same(qtype, monkeypatch):
    """With the reference in the kernel's place, whose codes and scales a cache must be able to read."""
    monkeypatch.setattr(rotated.targets, "kernel", lambda of: of.reference)
    monkeypatch.setattr(rotated, "choose", lambda which, pallas, xla, *x: (pallas if which == "pallas" else xla)(*x))
    rng, (B, T) = np.random.default_rng(0), (3, 2)
    for kind in (Dense(), QuantizedCache(qtype=qtype)):
        layer = kind.create(B, 16, 2, 64, jnp.float32)
        q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, 64)), jnp.float32) for heads in (4, 2, 2))
        positions, start, counts = (
            jnp.asarray([[3, 4], [-1, -1], [15, 16]]),
            jnp.asarray([3, 0, 15]),
            jnp.asarray([2, 0, 2]),
        )
        found, expected = (
            _append(layer, q, k, v, positions, start, counts, implementation=which) for which in ("pallas", "xla")
        )
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6)
        assert np.array_equal(found[0], rotate(q, positions, ROPE))


def test_it_has_the_gradient_of_the_formula(monkeypatch):
    """With an opaque formula in the kernel's place, as a kernel that JAX can't see into: what remains is the rule."""

    def opaque(*arrays):
        return jax.lax.stop_gradient(rope_append.reference(*arrays))

    monkeypatch.setattr(rotated.targets, "kernel", lambda _: opaque)
    monkeypatch.setattr(rotated, "choose", lambda which, pallas, xla, *x: (pallas if which == "pallas" else xla)(*x))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, heads, 64)), jnp.float32) for heads in (4, 2, 2))
    layer, at = Dense().create(1, 8, 2, 64, jnp.float32), jnp.asarray([[3, 4]])

    def loss(which, q, k, v):
        found = _append(layer, q, k, v, at, at[:, 0], jnp.asarray([2]), implementation=which)
        return sum((jnp.sin(x) * (1 + i)).sum() for i, x in enumerate(jax.tree.leaves(found)))

    for one, other in zip(*(jax.grad(loss, (1, 2, 3))(which, q, k, v) for which in ("pallas", "xla")), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
        assert np.abs(one).max() > 0.1
