"""Weights in 8 bits, one scale for each output: a quarter of float32's bytes for a loss that is hard to measure."""

import dataclasses
from typing import ClassVar

import jax

from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.rounding import round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly

_round = jax.jit(round_to_nearest, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(WeightOnly):
    """Round each output's weights to `max |w| / 127` times -127..127."""

    name: ClassVar[str] = "int8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2206.01861",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.005,
        takes="kernels",
    )

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        return _round(kernel, inputs, "int8")
