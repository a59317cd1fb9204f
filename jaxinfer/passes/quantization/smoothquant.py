"""w8a8 for activations with outlier channels: part of their range moves into the weights, at no cost when it runs.

The product stays int8 x int8; where activations have no outliers it gains little over w8a8.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.calibrated import CalibratedWeights, round_int8
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.rescaling import folds
from jaxinfer.passes.quantization.weights import outputs_first
from jaxinfer.tree import select

Stats = Mapping[str, Mapping[str, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(CalibratedWeights):
    """Divide each input by `max|x|^alpha / max|w|^(1-alpha)`, multiply its weights, then int8 times int8."""

    name: ClassVar[str] = "smoothquant"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2211.10438",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.02,
        rounds_activations=True,
        takes="kernels",
    )
    wants: ClassVar[tuple[str, ...]] = ("absmax",)
    linear = DynamicLinear
    experts = DynamicExperts
    table = DynamicEmbedding
    alpha: float = 0.5  # how much of the range moves: 0 evens the weights' maxima out, 1 the activations'
    folds: tuple[str, ...] = ("qkv", "gate_up")  # which inputs are scaled: of qkv, gate_up, down, o
    rounding: bool = True  # false scales only: the same function, for another pass to round

    def visit(self, block: Any, stats: Stats) -> Any:
        """Return the layer with its activations smoothed and its kernels in int8.

        Raises:
            InputError: `alpha` is outside of 0..1.
        """
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha={self.alpha}: must be in 0..1")
        nodes = select(block, (Linear, Experts))
        for fold in folds(block, self.folds):
            paths = [path for path in fold.readers if self.chooses(path)]
            if paths:
                x = stats[fold.readers[0]]["absmax"]  # a router's, where there is one: of every token
                w = functools.reduce(jnp.maximum, (_largest(nodes[path], x.ndim) for path in paths))
                block = fold.rescale(block, smoothing_factors(fold.narrow(x), fold.narrow(w), self.alpha))
        return self.quantize(block, lambda w, n, _: round_int8(w, n, "int8")) if self.rounding else block


def smoothing_factors(x: Float[Array, "*E C"], w: Float[Array, "*E C"], alpha: float) -> Float[Array, "*E C"]:
    """Return `s = x^alpha / w^(1-alpha)` of the maxima of channels and of their weights; 1 where either is 0."""
    s = jnp.where((x > 0) & (w > 0), x**alpha / jnp.where(w > 0, w, 1.0) ** (1 - alpha), 1.0)
    return jnp.clip(s, 1e-5, 1e5)


def _largest(node: Linear | Experts, ndim: int) -> Float[Array, "*E I"]:
    """Return the largest weight of each input; of all experts together where they share the input (`ndim` 1)."""
    _, kernel, inputs = outputs_first(node)
    experts = kernel.shape[:1] if isinstance(node, Experts) else ()
    outputs = kernel.shape[len(experts) : kernel.ndim - inputs]
    w = jnp.abs(kernel.astype(jnp.float32)).reshape(*experts, math.prod(outputs), -1).max(axis=-2)
    return w.max(axis=0) if w.ndim > ndim else w
