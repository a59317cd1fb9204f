"""How far a kernel may be from the float32 reference, by dtype: four times what XLA's own attention is, in that dtype.

`tests/test_kernels.py` measures XLA again: 5.2e-7 in float32 and 5.0e-3 in bfloat16, over the cases that it can do.
"""

import numpy as np
from jaxtyping import Shaped

from pallas_kernels.calls import Known

# Largest |found - expected| over the largest |expected| of a case.
BOUNDS = {"float32": 2e-6, "bfloat16": 2e-2}


def relative_error(found: Shaped[Known, "*a"], expected: Shaped[Known, "*a"]) -> float:
    """Return the largest difference over the largest magnitude expected; NaN where anything found is not finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)) if found.size else 0.0
