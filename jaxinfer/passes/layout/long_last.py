"""Kernels stored with their longer side contiguous: wide ones [in, out], tall ones [out, in].

Lossless. A vector-matrix product runs along contiguous memory: the longer each run, the nearer to memory speed.
"""

import math
from typing import Any

from jaxinfer.models.layers import Linear
from jaxinfer.ops.quantized import is_quantized
from jaxinfer.passes.layout.turn import letters, turn
from jaxinfer.tree import rewrite


def long_last(tree: Any) -> Any:
    """Return the tree with every Linear's kernel the long way; abstract trees work too."""
    return rewrite(tree, Linear, ".*", _long_last)


def _long_last(linear: Linear) -> Linear:
    if is_quantized(linear.kernel):
        return linear  # always outputs first: the groups that share a scale lie along the inputs
    inner, outer = letters(linear)
    kernel = linear.eq.split("->")[0].split(",")[1]
    size = dict(zip(kernel, linear.kernel.shape, strict=True))
    wide = math.prod(size[c] for c in outer) >= math.prod(size[c] for c in inner)
    return turn(linear, inputs_first=wide)
