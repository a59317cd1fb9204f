"""The gradient of prefill attention against that of its reference."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.kernels import kernel
from pallas_kernels.prefill_attention import gradient, reference
from pallas_kernels.tolerance import BOUNDS, relative_error

CASES = ("odd_63", "odd_60_h80", "gqa_8_h128", "chunk", "empty_rows", "window", "window_sinks", "ragged_window", "bf16")


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_reference(name):
    case = next(c for c in kernel("prefill_attention").tests if c.name == name)
    inputs = case.inputs()
    floats = {n: inputs.pop(n) for n in "qkv"}
    weight = jax.random.normal(jax.random.key(0), floats["q"].shape)
    options = dict(case.options)
    with_lse = options.pop("return_lse", False) and name != "empty_rows"  # there lse is -inf

    def gradients(attend, **more):
        def loss(x):
            found = attend(**x, **inputs, **options, return_lse=with_lse, **more)
            out, lse = found if with_lse else (found, jnp.zeros(1))
            return (out.astype(jnp.float32) * weight).sum() + jnp.sin(lse).sum()

        return jax.grad(loss)(floats)

    found = gradients(gradient.prefill_attention, blocks=case.blocks, interpret=True)
    expected = gradients(reference)
    for n in "qkv":
        assert relative_error(found[n], expected[n]) < BOUNDS[str(floats[n].dtype)]
