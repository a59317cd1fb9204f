"""Running a kernel's cases, for the tests of the kernels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.kernels import KERNELS, kernel
from pallas_kernels.tolerance import BOUNDS, relative_error

ALL = [(name, case.name) for name in KERNELS for case in kernel(name).tests]


def case_of(name: str, case: str) -> tuple[Kernel, Case]:
    """Return a kernel and one of its test cases."""
    found = kernel(name)
    return found, next(c for c in (*found.tests, *found.gpu_tests) if c.name == case)


def check(
    found: Kernel, case: Case, interpret: Any, *, known: bool = False, seed: int = 0, gpu: bool = False,
    bounds: Mapping[str, float] = BOUNDS,
) -> None:  # fmt: skip
    """Compare a kernel with its reference, NaN wherever it must not look.

    `known`: its scalars are numpy arrays, written into the kernel; else they are arguments of the call. `gpu`: it is
    the kernel for a GPU.
    """
    inputs = case.inputs(seed)
    spoiled = case.spoil(inputs) if case.spoil else inputs
    arrays, inputs = jax.tree.map(jnp.asarray, (spoiled, inputs))
    given = spoiled if known else arrays
    call, blocks = (found.gpu, case.gpu_blocks) if gpu else (found.tpu, case.blocks)
    outputs = call(**given, **case.options, blocks=blocks, interpret=interpret)
    expected = found.reference(**inputs, **case.options)
    if case.donated:
        # What is changed in place keeps the rest as it was, whatever it holds, bit for bit.
        *outputs, changed = outputs
        *expected, _ = expected
        for one, other in zip(changed, found.reference(**arrays, **case.options)[-1], strict=True):
            np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))
    for one, other in zip(jax.tree.leaves(outputs), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        nothing = np.isneginf(other.astype(np.float32))  # the log-sum-exp of what sees no slot
        np.testing.assert_array_equal(np.isneginf(one.astype(np.float32)), nothing)
        error = relative_error(np.where(nothing, 0, one), np.where(nothing, 0, other))
        assert error <= bounds[one.dtype.name], f"{case.name}: off by {error:.2e}"
