"""Kernels stored [out, in] instead of [in, out]: the same products, read along the other axis.

Lossless. Which order is faster depends on the device, the dtype and the number of rows.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models.layers import Linear
from jaxinfer.tree import replace, rewrite


def outputs_first(tree: Any) -> Any:
    """Return the tree with every inputs-first Linear turned round; abstract trees work too."""
    return rewrite(tree, Linear, ".*", _turn)


def _turn(linear: Linear) -> Linear:
    left, out = linear.eq.split("->")
    x, kernel = left.split(",")
    inner, outer = x[2:], out[2:]
    if kernel == outer + inner:
        return linear
    order = (*range(len(inner), len(kernel)), *range(len(inner)))
    leaf = linear.kernel
    turn = lambda k: jnp.transpose(k, order)  # noqa: E731
    kernel = jax.eval_shape(turn, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else turn(leaf)
    return replace(linear, kernel=kernel, eq=f"{x},{outer}{inner}->{out}", axes=tuple(linear.axes[i] for i in order))
