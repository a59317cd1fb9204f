"""Attention over pages by XLA is that of the kernel's reference, whatever the pages that are not live hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.ops.paged_attention import New, Pages, paged_attention
from pallas_kernels import chips
from pallas_kernels.kernels import kernel
from pallas_kernels.paged_decode_attention.cases import case as paged_case

NAMES = ("pages_16", "empty_row", "across_pages", "first_tokens", "softcap")
MANY = paged_case("many", 2, 2, 2, 2, 16, 32, [1300, 40], dtype=jnp.float32)  # several blocks of pages
WINDOW = paged_case("window", 2, 2, 2, 2, 16, 32, [1300, 40], dtype=jnp.float32, window=100)


def arguments(inputs):
    """Return a case's inputs as the op takes them."""
    T, length = inputs["q"].shape[1], jnp.asarray(inputs["length"])
    new = New(inputs["new"]["k"], inputs["new"]["v"], None, None, length - T, jnp.where(length > 0, T, 0))
    positions = (length - T)[:, None] + jnp.arange(T)
    return inputs["q"], new, Pages(inputs["k_pages"], inputs["v_pages"]), inputs["table"], positions


@pytest.mark.parametrize(
    "case", [MANY, WINDOW, *(c for c in kernel("paged_decode_attention").tests if c.name in NAMES)]
)
def test_pages_are_read_and_written_as_the_reference_does(case):
    found = kernel("paged_decode_attention")
    clean = case.inputs()
    spoiled = jax.tree.map(jnp.asarray, case.spoil(clean))
    options = {name: x for name, x in case.options.items() if name != "return_lse"}
    attend = jax.jit(functools.partial(paged_attention, **options))
    out, pages = attend(*arguments(spoiled))
    expected, _ = found.reference(**jax.tree.map(jnp.asarray, clean), **options)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    for one, other in zip(pages[:2], found.reference(**spoiled, **options)[-1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("tokens", "kernel_of"), [(1, "paged_decode_attention"), (8, "paged_decode_attention"), (64, "prefill_attention")]
)
def test_the_kernels_are_taken_for_a_tpu(tokens, kernel_of):
    case = paged_case("bf16", 2, tokens, 2, 8, 32, 128, [130, 65])
    attend = jax.jit(functools.partial(paged_attention, scale=0.1))
    with chips.assume("v5e"):
        traced = attend.trace(*jax.tree.map(jnp.asarray, arguments(case.inputs())))
    assert kernel_of in str(traced.jaxpr)
