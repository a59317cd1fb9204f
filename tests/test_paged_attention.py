"""Attention over pages by XLA is that of the kernel's reference, whatever the pages that are not live hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.paged_attention import paged_attention
from pallas_kernels import chips
from pallas_kernels.kernels import kernel
from pallas_kernels.paged_decode_attention.cases import case as paged_case

NAMES = ("pages_16", "empty_row", "across_pages", "first_tokens", "softcap")
MANY = paged_case("many", 2, 2, 2, 2, 16, 32, [1300, 40], dtype=jnp.float32)  # several blocks of pages
WINDOW = paged_case("window", 2, 2, 2, 2, 16, 32, [1300, 40], dtype=jnp.float32, window=100)


@pytest.mark.parametrize(
    "case", [MANY, WINDOW, *(c for c in kernel("paged_decode_attention").tests if c.name in NAMES)]
)
def test_pages_are_read_and_written_as_the_reference_does(case):
    found = kernel("paged_decode_attention")
    clean = case.inputs()
    spoiled = jax.tree.map(jnp.asarray, case.spoil(clean))
    options = {name: x for name, x in case.options.items() if name != "return_lse"}
    attend = jax.jit(functools.partial(paged_attention, **options))
    new, pages = tuple(spoiled["new"][x] for x in "kv"), (spoiled["k_pages"], spoiled["v_pages"])
    out, pages = attend(spoiled["q"], new, pages, spoiled["table"], spoiled["length"])
    expected, _ = found.reference(**jax.tree.map(jnp.asarray, clean), **options)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for one, other in zip(pages, found.reference(**spoiled, **options)[-1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_kernel_is_taken_for_a_tpu():
    case = paged_case("bf16", 2, 1, 2, 8, 32, 128, [130, 65])
    inputs = jax.tree.map(jnp.asarray, case.inputs())
    new, pages = tuple(inputs["new"][x] for x in "kv"), (inputs["k_pages"], inputs["v_pages"])
    attend = jax.jit(functools.partial(paged_attention, scale=0.1))
    with chips.assume("v5e"):
        traced = attend.trace(inputs["q"], new, pages, inputs["table"], inputs["length"])
    assert "paged_decode_attention" in str(traced.jaxpr)
