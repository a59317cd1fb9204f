"""The GPU's rotation and append with no GPU: its threads run on NumPy arrays, and which programs hold it."""

import dataclasses
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
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.cache.ring import SLACK
from jaxinfer.cache.streaming import Streaming
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


def _operands(kind, B, T, H=128, dtype=jnp.bfloat16, slots=64):
    layer = jax.eval_shape(lambda: kind.create(B, slots, 2, H, dtype))
    q, k, v = (struct(B, T, heads, H, dtype=dtype) for heads in (8, 2, 2))
    return layer, q, k, v, *(struct(*shape, dtype=jnp.int32) for shape in ((B, T), (B,), (B,)))


def _append(layer, q, k, v, positions, start, counts, **options):
    return rotated.append_rotated(layer, q, k, v, positions, ROPE, start, counts, **options)


@pytest.mark.parametrize("kind", [Dense(), QuantizedCache(), QuantizedCache(qtype="float8_e4m3fn")])
def test_programs_hold_it_where_tokens_are_few_and_have_slots(kind):
    assert lowered(_append, *_operands(kind, 2, 3)).count(CALL) == 1
    for more in (_operands(kind, 2, 300), _operands(kind, 2, 1, dtype=jnp.float32), _operands(kind, 2, 1, H=96)):
        assert CALL not in lowered(_append, *more)


STREAMING = Streaming(sinks=4, window=20, rope=ROPE)
RINGS = [(Kivi(), 2), (Kivi(page=64), 2), (Kivi(bits=2), 1), (STREAMING, 1)]  # with a kernel that packs, or without


@pytest.mark.parametrize(("kind", "kernels"), RINGS, ids=str)
def test_programs_hold_it_where_few_tokens_enter_a_ring(kind, kernels):
    for T in (1, SLACK):
        assert lowered(_append, *_operands(kind, 2, T, slots=1024)).count(CALL) == kernels
    operands = _operands(kind, 2, SLACK + 1, slots=1024)
    assert CALL not in lowered(_append, *operands)
    with gpus.assume("h100"), pytest.raises(NotImplementedError, match="33 new tokens: must be at most 32"):
        jax.eval_shape(functools.partial(_append, implementation="pallas"), *operands)


def test_more_tokens_than_a_ring_has_slots_are_refused():
    case = next(case for case in TESTS if case.name == "ring")
    short = {x: jax.ShapeDtypeStruct((5, 2, 4, 128), jnp.bfloat16) for x in ("k_cache", "v_cache")}
    with pytest.raises(NotImplementedError, match="5 tokens: must be at most the 4 slots"):
        jax.eval_shape(functools.partial(rope_append.gpu, ring=True), **{**case.shapes, **short})


@pytest.mark.parametrize("kind", [Kivi(group=8, residual=8), Kivi(group=8, residual=3, page=16), STREAMING], ids=str)
def test_a_ring_that_the_kernels_reference_writes_is_xlas(kind, monkeypatch):
    """Over steps of all lengths, rewound, and with a path of a tree kept: it holds the same, bit for bit."""
    monkeypatch.setattr(rotated.targets, "kernel", lambda of: of.reference)
    monkeypatch.setattr(rotated, "choose", lambda which, pallas, xla, *x: (pallas if which == "pallas" else xla)(*x))
    rng, B, K, H = np.random.default_rng(0), 3, 2, 16
    layers = [kind.create(B, 200, K, H, jnp.float32)] * 2
    assert layers[0].recent.size < 100
    append = jax.jit(_append, static_argnames="implementation")
    length = np.array([0, 50, 190])
    for T, fewer in ((1, 0), (8, 1), (1, 0), (SLACK, 0), (5, 9), (40, 0), (1, 7), (8, 0), (30, 0), (1, 0), (1, 0)):
        counts = np.array([T, T // 2, min(T, 3)])
        q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (4, K, K))
        positions = np.where(np.arange(T) < counts[:, None], length[:, None] + np.arange(T), -1)
        rows = jnp.asarray(positions), jnp.asarray(length), jnp.asarray(counts)
        ways = ["pallas" if T <= SLACK else "xla", "xla"]
        found = [append(x, q, k, v, *rows, implementation=way) for x, way in zip(layers, ways, strict=True)]
        length = np.maximum(length + counts - fewer, 0)
        if T == 8:  # as a tree's nodes, of which a path is kept
            nodes, kept = jnp.asarray([[0, 2, 5]] * B), jnp.asarray([3, 2, 1])
            length = np.asarray(rows[1] + kept)
            found = [(q, layer.keep(rows[1], nodes, kept)) for q, layer in found]
        elif fewer:
            found = [(q, layer.rewind(jnp.asarray(length))) for q, layer in found]
        for one, other in zip(*map(jax.tree.leaves, found), strict=True):
            np.testing.assert_array_equal(one, other)
        layers = [layer.rewind(jnp.asarray(length)) for _, layer in found]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Nothing:
    """A cache that keeps nothing."""

    exact_rewind = None

    def append(self, k, v, start, counts):
        return self

    attend = rewind = keep = take = fork = append


def test_a_cache_without_slots_appends_by_itself():
    _, *operands = _operands(Dense(), 2, 1)
    assert CALL not in lowered(functools.partial(_append, Nothing()), *operands)
    with gpus.assume("h100"), pytest.raises(NotImplementedError, match="Nothing: has no slots"):
        jax.eval_shape(functools.partial(_append, Nothing(), implementation="pallas"), *operands)


@pytest.mark.parametrize("kind", [Paged(page=8), Paged(page=8, int8=True)], ids=str)
def test_pages_that_the_kernels_reference_writes_are_xlas(kind, monkeypatch):
    """And so is what is attended from them: to the layer it is all the same when the tokens were written."""
    monkeypatch.setattr(rotated.targets, "kernel", lambda of: of.reference)
    monkeypatch.setattr(rotated, "choose", lambda which, pallas, xla, *x: (pallas if which == "pallas" else xla)(*x))
    rng, B, K, H, length = np.random.default_rng(0), 3, 2, 64, np.array([0, 7, 27])
    layers = [kind.create(B, 48, K, H, jnp.float32)] * 2
    for T, fewer in ((1, 0), (4, 1), (1, 0), (3, 0), (1, 3), (2, 0)):
        counts = np.array([T, T // 2, T])
        q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (4, K, K))
        positions = jnp.asarray(np.where(np.arange(T) < counts[:, None], length[:, None] + np.arange(T), -1))
        found = []
        for layer, way in zip(layers, ("pallas", "xla"), strict=True):
            turned, layer = _append(
                layer, q, k, v, positions, jnp.asarray(length), jnp.asarray(counts), implementation=way
            )
            found.append(layer.attend(turned, positions, scale=0.1, window=None, softcap=None))
        seen = np.asarray(positions) >= 0
        np.testing.assert_allclose(found[0][0][seen], found[1][0][seen], rtol=1e-6, atol=1e-6)
        length = np.maximum(length + counts - fewer, 0)
        layers = [layer.rewind(jnp.asarray(length)) for _, layer in found]
        for one, other in zip(*map(jax.tree.leaves, layers), strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-6)


def test_programs_hold_it_where_few_tokens_enter_pages():
    layer, q, k, v, positions, start, counts = _operands(Paged(), 2, 3)

    def step(layer, q, k, v, positions, start, counts):
        q, layer = _append(layer, q, k, v, positions, start, counts)
        return layer.attend(q, positions, scale=0.1, window=None, softcap=None)

    assert lowered(step, layer, q, k, v, positions, start, counts).count(CALL) == 2


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
