"""The machine-code products against plain numpy, at odd sizes and at the ends of every range."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops import cpu_kernels
from jaxinfer.ops.quantized import Packed, dequantize, pack


def _missing() -> str:
    """Return what this machine lacks for the kernels. Anything else that stops them is a failure, and no skip."""
    try:
        from jaxinfer.ops.cpu_kernels_call import instruction_set
    except ImportError:
        return "llvmlite is not installed"
    if jax.default_backend() != "cpu":
        return "not on a CPU"
    return "" if instruction_set() else "no AVX2, AVX-512 VNNI or NEON dot products"


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")
SHAPES = [(960, 576), (7, 33), (1, 1), (5, 100), (130, 1000), (3, 16), (2, 15)]
RANGES = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}


@pytest.fixture(params=["host", "avx2"])
def isa(request, monkeypatch):
    """Run with the host's vectors and, where the host has them, with the narrower ones that others use."""
    from jaxinfer.ops import cpu_kernels_call

    if request.param == "avx2":
        if cpu_kernels_call.instruction_set() != "avx512_vnni":
            pytest.skip("this host has no second set of vectors")
        monkeypatch.setattr(cpu_kernels_call, "instruction_set", lambda: "avx2")
    return cpu_kernels_call.instruction_set()


def _ints(rng, low, high, shape):
    return jnp.asarray(rng.integers(low, high, shape, dtype=np.int8))


def _dot(x, w):
    return np.asarray(x, np.int32) @ np.asarray(w, np.int32).T


def _rounded(x):
    """Return x in whole numbers of a 127th of each row's largest magnitude, and that 127th."""
    scale = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return np.rint(x / scale), scale


def _close(y, expected, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(y), expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-30))


def test_a_machine_that_has_what_they_need_has_kernels():
    assert cpu_kernels.available()


@pytest.mark.parametrize("M", range(1, 10))
def test_int8_dot_is_exact_at_any_size(isa, M):
    rng = np.random.default_rng(M)
    for O, I in SHAPES:
        x, w = _ints(rng, -128, 128, (M, I)), _ints(rng, -128, 128, (O, I))
        np.testing.assert_array_equal(np.asarray(cpu_kernels.int8_dot(x, w)), _dot(x, w))


@pytest.mark.parametrize("a,b", [(-128, -128), (-128, 127), (127, 127), (0, -128)])
def test_int8_dot_does_not_overflow_at_its_largest_sums(isa, a, b):
    for I in (64, 70_001, 131_071):
        x, w = jnp.full((2, I), a, jnp.int8), jnp.full((5, I), b, jnp.int8)
        assert np.unique(np.asarray(cpu_kernels.int8_dot(x, w))).tolist() == [a * b * I]


@pytest.mark.parametrize("M", [1, 2, 5, 8, 13])
def test_int8_matmul_is_its_composition(isa, M):
    rng = np.random.default_rng(M)
    for O, I in SHAPES:
        x = rng.standard_normal((M, I)).astype(np.float32) * rng.choice([1e-3, 1.0, 1e4], (M, 1)).astype(np.float32)
        x[M // 2] = 0
        w, scale = _ints(rng, -128, 128, (O, I)), rng.random(O, np.float32)
        q, s = _rounded(x)
        y = np.asarray(cpu_kernels.int8_matmul(jnp.asarray(x), w, jnp.asarray(scale)))
        expected = _dot(q, w).astype(np.float32) * s * scale
        np.testing.assert_allclose(y, expected, rtol=1e-6, atol=0)
        assert not y[M // 2].any()


@pytest.mark.parametrize("group", [16, 48, 64, 96, 192])
@pytest.mark.parametrize("M", [1, 5])
def test_groups_of_activations_have_scales_of_their_own(isa, group, M):
    rng = np.random.default_rng(group)
    I = 3 * group
    x = rng.standard_normal((M, I)).astype(np.float32) * np.repeat(np.float32([1e-3, 1, 1e3]), group)
    x[0, :group] = 0
    w, scale = _ints(rng, -128, 128, (37, I)), rng.random(37, np.float32)
    y = np.asarray(cpu_kernels.int8_matmul(jnp.asarray(x), w, jnp.asarray(scale), group))
    expected = 0
    for g in range(0, I, group):
        q, s = _rounded(x[:, g : g + group])
        expected = expected + _dot(q, w[:, g : g + group]).astype(np.float64) * s * scale
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    for bad in (8, 24, 2 * I):
        with pytest.raises(ValueError, match=f"group={bad}: must be a multiple of 16 that divides {I}"):
            cpu_kernels.int8_matmul(jnp.asarray(x), w, jnp.asarray(scale), bad)


def test_int8_matmul_rounds_halves_to_even(isa):
    x = jnp.asarray([[127, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 90], jnp.float32)
    y = cpu_kernels.int8_matmul(x, jnp.eye(96, dtype=jnp.int8), jnp.ones(96))
    assert np.asarray(y)[0, :6].tolist() == [127, 0, 2, 2, 0, -2]


def test_a_nan_is_not_hidden(isa):
    x = jnp.ones((2, 64)).at[1, 5].set(jnp.nan)
    y = np.asarray(cpu_kernels.int8_matmul(x, jnp.ones((3, 64), jnp.int8), jnp.ones(3)))
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def _quantized(rng, qtype, O, I, groups, dtype, with_offset):
    codes = jnp.asarray(rng.integers(*RANGES[qtype], (O, I)), jnp.int8)
    values = codes if qtype == "int8" else pack(codes)
    scale = jnp.asarray(rng.random((O, groups)) + 0.1, dtype)
    offset = jnp.asarray(rng.standard_normal((O, groups)), dtype) if with_offset else None
    return values, scale, offset, np.asarray(dequantize(Packed(values, scale, offset, qtype, jnp.float32)))


GROUPED = [(960, 576, 18), (70, 576, 9), (3, 32, 1), (7, 1536, 12), (7, 1536, 3), (5, 160, 5)]


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("qtype", RANGES)
def test_weight_only_is_a_product_with_the_dequantized_weight(isa, qtype, dtype, with_offset):
    rng = np.random.default_rng(0)
    for O, I, groups in GROUPED + [(5, 99, 3), (4, 100, 1)] * (qtype == "int8"):
        values, scale, offset, w = _quantized(rng, qtype, O, I, groups, dtype, with_offset)
        x = rng.standard_normal((5, I)).astype(np.float32)
        for rows in (1, 5):
            y = cpu_kernels.weight_only(jnp.asarray(x[:rows]), values, scale, offset, qtype=qtype)
            _close(y, x[:rows] @ w.T)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("qtype,dtype", [("int4", "float16"), ("uint4", "float16"), ("int4", "float32")])
def test_q4_matmul_rounds_x_by_groups_of_32(isa, qtype, dtype, with_offset):
    rng = np.random.default_rng(0)
    for O, I, groups in GROUPED:
        values, scale, offset, w = _quantized(rng, qtype, O, I, groups, dtype, with_offset)
        x = rng.standard_normal((5, I)).astype(np.float32)
        x[0] = 0
        q, s = _rounded(x.reshape(5, -1, 32))
        expected = (q * s).reshape(5, I) @ w.T
        _close(cpu_kernels.q4_matmul(jnp.asarray(x), values, scale, offset, qtype=qtype), expected)
        _close(cpu_kernels.q4_matmul(jnp.asarray(x[1:2]), values, scale, offset, qtype=qtype), expected[1:2])


def test_inside_a_compiled_loop_and_from_two_threads_at_once():
    rng = np.random.default_rng(0)
    w, scale = _ints(rng, -128, 128, (600, 600)), jnp.full(600, 2e-4)

    @jax.jit
    def repeat(x, w):
        return jax.lax.while_loop(
            lambda c: c[1] < 20, lambda c: (cpu_kernels.int8_matmul(c[0], w, scale), c[1] + 1), (x, 0)
        )[0]

    xs = [jnp.asarray(rng.standard_normal((1, 600)), jnp.float32) for _ in range(2)]
    expected, results = [np.asarray(repeat(x, w)) for x in xs], [[], []]
    assert np.abs(expected[0]).max() > 0

    def work(n):
        results[n] += [np.asarray(repeat(xs[n], w)) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(2):
        assert len(results[n]) == 20 and all((y == expected[n]).all() for y in results[n])


F, I8, U8 = jnp.float32, jnp.int8, jnp.uint8


@pytest.mark.parametrize(
    "call,said",
    [
        (
            lambda: cpu_kernels.weight_only(jnp.ones((1, 4)), jnp.ones((2, 16), U8), jnp.ones((2, 1)), qtype="int4"),
            "of 32",
        ),
        (lambda: cpu_kernels.int8_dot(jnp.ones((0, 4), I8), jnp.ones((2, 4), I8)), "empty"),
        (lambda: cpu_kernels.int8_matmul(jnp.ones((1, 4), jnp.bfloat16), jnp.ones((2, 4), I8), jnp.ones(2)), "float32"),
        (lambda: cpu_kernels.int8_matmul(jnp.ones((1, 4)), jnp.ones((2, 4), I8), jnp.ones(2, jnp.bfloat16)), "one for"),
        (lambda: _grouped(U8, 32, (2, 1), qtype="nf4"), "nf4"),
        (lambda: _grouped(U8, 24, (2, 1), qtype="int4"), "multiple of 32"),
        (lambda: _grouped(U8, 32, (2, 3), qtype="int4"), "divisor of 64"),
        (lambda: _grouped(I8, 64, (2, 1), qtype="int8", dtype=jnp.bfloat16), "float32 or float16"),
        (lambda: _grouped(U8, 48, (2, 1), product=cpu_kernels.q4_matmul, qtype="int4"), "multiple of 128"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def _grouped(kind, width, scale, *, qtype, dtype=F, product=cpu_kernels.weight_only):
    x = jnp.ones((1, width if kind == I8 else 2 * width))
    return product(x, jnp.ones((2, width), kind), jnp.ones(scale, dtype), qtype=qtype)


def test_without_llvmlite_there_are_no_kernels_and_no_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    cpu_kernels.available.cache_clear()
    try:
        assert not cpu_kernels.available()
        with pytest.raises(ValueError, match="llvmlite"):
            cpu_kernels.int8_dot(jnp.ones((1, 4), jnp.int8), jnp.ones((2, 4), jnp.int8))
    finally:
        cpu_kernels.available.cache_clear()


def test_another_process_can_run_the_executable_from_the_compile_cache(tmp_path):
    program = """
import jax, jax.numpy as jnp
from jaxinfer.ops import cpu_kernels
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("/cache_hits") else None)
x, w = jnp.arange(100, dtype=jnp.int8).reshape(1, 100), jnp.ones((3, 100), jnp.int8)
print(jax.jit(lambda x, w: cpu_kernels.int8_dot(x, w) + 1)(x, w).tolist(), len(hits) > 0)
"""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env = {**os.environ, **settings, "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    for found in (False, True):
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.split("]]") == ["[[4951, 4951, 4951", f" {found}\n"]


def test_the_code_for_arm_has_dot_products_of_bytes(monkeypatch):
    llvm = pytest.importorskip("llvmlite.binding")
    from jaxinfer.ops import cpu_kernels_call

    monkeypatch.setattr(cpu_kernels_call, "instruction_set", lambda: "neon_dotprod")
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine(features="+neon,+dotprod", opt=2)
    for name in ("int8_matmul", "q4:uint4:half:offset:2"):
        module = cpu_kernels_call.optimize(cpu_kernels._kernel(name, "neon_dotprod"), machine)
        assert "sdot" in machine.emit_assembly(module)
