"""How far a kernel may be from the float32 reference: measured on XLA in the same dtype, not chosen to fit.

Each bound is twice the largest error, over the test cases of every kernel, of the reference's own formula computed by
XLA with inputs, products and results rounded to the dtype (`tests/test_kernels.py` measures it again).
"""

import jax.numpy as jnp
import numpy as np

# Largest |kernel - reference| over the largest |reference| of the case.
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


def relative_error(found: jnp.ndarray, expected: jnp.ndarray) -> float:
    """Return the largest difference over the largest magnitude expected; NaN where anything found is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)) if found.size else 0.0
