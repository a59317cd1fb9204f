"""The GPU's norm with no GPU: interpreted beside its reference, its gradient, and which programs hold it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreter
from test_gpu import CALL, lowered

from jaxinfer.ops import norm
from pallas_kernels import chips, rms_norm
from pallas_kernels.kernels import kernel
from pallas_kernels.rms_norm.cases import TESTS
from pallas_kernels.tolerance import BOUNDS, relative_error

ROW = jax.ShapeDtypeStruct((1, 1, 2048), jnp.bfloat16)
GAIN = jax.ShapeDtypeStruct((2048,), jnp.float32)


@pytest.mark.parametrize("case", TESTS, ids=lambda case: case.name)
def test_interpreted_it_is_its_reference(case):
    found, inputs = kernel("rms_norm"), case.inputs()
    with interpreter() as interpret:
        ours = found.gpu(**inputs, **case.options, interpret=interpret)
    expected = found.reference(**inputs, **case.options)
    assert ("add" in inputs) == isinstance(ours, tuple)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert relative_error(*(np.asarray(x, np.float32) for x in (one, other))) <= BOUNDS["bfloat16"] / 4


def test_a_programs_norms_are_the_kernels_where_rows_are_few_and_wide():
    alone, summed = (functools.partial(f, eps=1e-5) for f in (norm.rms_norm, norm.add_rms_norm))
    assert lowered(alone, ROW, GAIN).count(CALL) == lowered(summed, ROW, ROW, GAIN).count(CALL) == 1
    for shape, dtype in (((65, 1, 2048), jnp.bfloat16), ((1, 1, 2048), jnp.float32), ((1, 2, 512), jnp.bfloat16)):
        x = jax.ShapeDtypeStruct(shape, dtype)
        gain = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)
        assert CALL not in lowered(summed, x, x, gain)
    with chips.assume("v5e"):
        traced = jax.jit(summed).trace(ROW, ROW, GAIN)
        assert "tpu_custom_call" not in traced.lower(lowering_platforms=("tpu",)).as_text()
    with chips.assume("v5e"), pytest.raises(NotImplementedError, match="rms_norm: has no kernel for TPUs"):
        jax.eval_shape(functools.partial(summed, implementation="pallas"), ROW, ROW, GAIN)


def test_it_has_the_gradient_of_the_formula(monkeypatch):
    """With the formula in the kernel's place, as a kernel that JAX can't see into: what remains is the rule."""
    rng = np.random.default_rng(0)
    x, y, scale = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, 1024), (2, 3, 1024), (1024,)))

    def opaque(x, scale, *, eps, add=None):
        return jax.lax.stop_gradient(rms_norm.reference(x, scale, eps=eps, add=add))

    monkeypatch.setattr(norm.targets, "kernel", lambda _: opaque)
    monkeypatch.setattr(norm, "choose", lambda implementation, pallas, xla, *x: (pallas if implementation else xla)(*x))

    def loss(which, x, y, scale):
        total, found = norm.add_rms_norm(x, y, scale, 1e-5, implementation=which)
        return (jnp.sin(total) * found).sum() + norm.rms_norm(found, scale, 1e-5, implementation=which).sum()

    ours, plain = (
        jax.grad(functools.partial(loss, which), argnums=(0, 1, 2))(x, y, scale) for which in ("pallas", None)
    )
    for one, other in zip(ours, plain, strict=True):
        assert np.abs(other).max() > 0.1
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * float(np.abs(other).max()))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 2048), jnp.float32, "x of float32: must be bfloat16 or float16"),
        ((1, 100), jnp.bfloat16, "D=100: must be a multiple of 128, and at most 8192"),
        ((1, 16384), jnp.bfloat16, "D=16384: must be a multiple of 128, and at most 8192"),
    ],
)
def test_what_it_refuses(shape, dtype, message):
    x, scale = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(shape[1:], jnp.float32)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(rms_norm.gpu, eps=1e-5), x, scale)
