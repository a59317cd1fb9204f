"""Norm gains moved into the kernels that read the norm: exact, and what is left of the norm commutes with rotations.

`norm(x) W = (x / rms(x)) (diag(g) W)`: the norm keeps a gain of ones.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Leaf, Linear, RMSNorm
from jaxinfer.models.moe import Experts
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.quantized import is_quantized
from jaxinfer.passes.base import FREE
from jaxinfer.passes.layout.turn import letters
from jaxinfer.tree import replace, rewrite


def fold_norms(model: Transformer) -> Transformer:
    """Return the same function with gains of ones in the norms that come before attention and the MLP.

    The final norm is folded too where the model has logits of its own; a table that is tied to them is read as
    embedding as well and can't take the gain. Norms after a layer (Gemma) and of heads stay.

    Raises:
        InputError: a kernel that reads a norm is quantized.
    """
    layers = [_fold(_fold(block, "attention_norm", "attention"), "mlp_norm", "mlp") for block in model.layers]
    model = replace(model, layers=layers)
    plain = type(model.final_norm) is RMSNorm  # a rotated one does its gain's work where it is
    return model if model.unembed is None or not plain else _fold(model, "final_norm", "unembed")


def embed_axis(node: Linear | Experts) -> tuple[int | None, bool]:
    """Return which kernel axis is the residual stream (None: none is), and whether the node writes to it."""
    if "embed" not in node.axes:
        return None, False
    axis = node.axes.index("embed")
    if isinstance(node, Experts):
        return axis, axis == 2
    return axis, node.eq.split("->")[0].split(",")[1][axis] in letters(node)[1]


def check_float(leaf: Leaf) -> Leaf:
    """Return a leaf that is an array of floats.

    Raises:
        InputError: it is quantized.
    """
    if is_quantized(leaf):
        raise InputError(FREE["kernels"])
    return leaf


def _fold(owner: Any, norm: str, part: str) -> Any:
    gain = getattr(owner, norm).scale

    def fold(node: Linear | Experts) -> Linear | Experts:
        axis, writes = embed_axis(node)
        return node if axis is None or writes else replace(node, kernel=_times(check_float(node.kernel), gain, axis))

    folded = rewrite(getattr(owner, part), (Linear, Experts), ".*", fold)
    return replace(owner, **{part: folded, norm: replace(getattr(owner, norm), scale=jnp.ones_like(gain))})


def _times(w: Float[Array, "..."], gain: Float[Array, "D"], axis: int) -> Float[Array, "..."]:
    by_axis = jnp.expand_dims(gain, [i for i in range(w.ndim) if i != axis])
    return (w.astype(jnp.float32) * by_axis).astype(w.dtype)
