"""Weights in 4 bits, those that meet large activations on a finer grid: int4's bytes, less of its loss, no inverse.

The finer grid is a factor for each input, which the operation before takes back: the step that runs is int4's.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import Quantized
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.awq_search import nearest, search_factors, search_range
from jaxinfer.passes.quantization.calibrated import CalibratedWeights
from jaxinfer.passes.quantization.rescaling import FOLDS, Fold, folds
from jaxinfer.passes.quantization.rounding import fit_group, leaf, scales
from jaxinfer.passes.quantization.weights import outputs_first
from jaxinfer.tree import select

Stats = Mapping[str, Mapping[str, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(CalibratedWeights):
    """Multiply the weights of an input by a power of its mean magnitude, fold the inverse into what precedes, round."""

    name: ClassVar[str] = "awq"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2306.00978",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.12,
        takes="kernels",
    )
    wants: ClassVar[tuple[str, ...]] = ("mean_abs", "hessian")
    group: int = 64  # inputs that share a scale
    symmetric: bool = True  # without an offset
    clip: bool = True  # search each group's range too, by what it costs at the output
    steps: int = 20  # of the search for an exponent in 0..1; 0 leaves the weights unscaled
    folds: tuple[str, ...] = FOLDS  # which inputs may be scaled: of qkv, gate_up, down, o
    rounding: bool = True  # false scales only: the same function, for another pass to round

    def visit(self, block: Any, stats: Stats) -> Any:
        """Return the layer with its kernels scaled and rounded."""
        chosen: dict[str, Array] = {}  # factors of the inputs, by path
        for fold in folds(block, self.folds):
            found = self.factors(block, fold, stats)
            if found is not None:
                block = fold.rescale(block, found)
                chosen |= dict.fromkeys(fold.readers, fold.widen(found))

        def round_kernel(kernel: Array, inputs: int, path: str) -> Quantized:
            hessian = stats[path]["hessian"]
            if path in chosen:
                hessian = hessian / (chosen[path][..., :, None] * chosen[path][..., None, :])
            group = fit_group(self.group, kernel.shape, inputs, path)
            return _round(kernel, inputs, hessian, self.qtype, group, self.clip)

        return self.quantize(block, round_kernel) if self.rounding else block

    @property
    def qtype(self) -> str:
        """The name of the 4-bit format."""
        return "int4" if self.symmetric else "uint4"

    def factors(self, block: Any, fold: Fold, stats: Stats) -> Float[Array, "*E C"] | None:
        """Return the best factors of a fold's channels, or None where none of its readers is to be rounded."""
        nodes = select(block, (Linear, Experts))
        paths = [path for path in fold.readers if self.chooses(path)]
        if not paths or not self.steps:
            return None
        kernels, groups = [], []
        for path in paths:
            _, kernel, inputs = outputs_first(nodes[path])
            hessian = stats[path]["hessian"]
            kernels.append((kernel.reshape(*hessian.shape[:-2], -1, hessian.shape[-1]), hessian))
            groups.append(fit_group(self.group, kernel.shape, inputs, path))
        mean = stats[fold.readers[0]]["mean_abs"]  # a router's, where there is one: of every token
        return search_factors(fold.narrow(mean, jnp.mean), kernels, groups, self.qtype, self.steps, fold.widen)[0]


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _round(kernel: Array, inputs: int, hessian: Array, qtype: str, group: int, clip: bool) -> Quantized:
    flat = kernel.astype(jnp.float32).reshape(*hessian.shape[:-2], -1, hessian.shape[-1])
    grid = search_range(flat, hessian, qtype, group) if clip else scales(flat, qtype, group)
    # The codes must fit the scale as it is stored, which may be rounded.
    grid = [None if part is None else part.astype(kernel.dtype).astype(jnp.float32) for part in grid]
    return leaf(nearest(flat, *grid, qtype), *grid, qtype, kernel.shape, inputs, kernel.dtype)
