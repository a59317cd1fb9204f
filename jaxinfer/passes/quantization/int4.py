"""Weights in 4 bits, a scale for each group of inputs: an eighth of float32's bytes, at a loss that shows."""

import dataclasses
from typing import ClassVar

import jax

from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.rounding import fit_group, round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly

_round = jax.jit(round_to_nearest, static_argnums=(1, 2, 3, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4(WeightOnly):
    """Round each group to nearest: `max |w| / 7` times -7..7, or 16 even steps from its least to its largest weight."""

    name: ClassVar[str] = "int4"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2210.17323",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.30,
        takes="kernels",
    )
    group: int = 64  # inputs that share a scale; where it does not divide them, the largest divisor below it
    symmetric: bool = True  # without an offset
    clip: bool = False  # search the range that rounds with the least squared error

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        group = fit_group(self.group, kernel.shape, inputs, path)
        return _round(kernel, inputs, "int4" if self.symmetric else "uint4", group, self.clip)
