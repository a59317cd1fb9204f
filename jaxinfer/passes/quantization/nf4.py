"""Weights in 4 bits on a grid made for normal weights: as small as int4, a little closer, and not an integer."""

import dataclasses
from typing import ClassVar

import jax

from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.rounding import fit_group, round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly

_round = jax.jit(round_to_nearest, static_argnums=(1, 2, 3, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NF4(WeightOnly):
    """Round each group to nearest: `max |w|` times one of the 16 quantiles of NormalFloat4 (QLoRA)."""

    name: ClassVar[str] = "nf4"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2305.14314",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.20,
        takes="kernels",
    )
    group: int = 64  # inputs that share a scale; where it does not divide them, the largest divisor below it
    clip: bool = False  # search the range that rounds with the least squared error

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        group = fit_group(self.group, kernel.shape, inputs, path)
        return _round(kernel, inputs, "nf4", group, self.clip)
