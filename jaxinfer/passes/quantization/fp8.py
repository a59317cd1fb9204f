"""Weights in 8-bit floats, one scale for each output: int8's bytes with steps that follow the magnitude."""

import dataclasses
from typing import ClassVar

import jax

from jaxinfer.errors import InputError, nearest
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.rounding import round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly

_FORMATS = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_round = jax.jit(round_to_nearest, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(WeightOnly):
    """Round each output's weights to 8-bit floats whose largest is `max |w|`."""

    name: ClassVar[str] = "fp8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2209.05433",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.05,
        takes="kernels",
    )
    format: str = "e4m3"  # e4m3: 3 bits of mantissa; e5m2: 2, and a wider range

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        if self.format not in _FORMATS:
            raise InputError(f"format={self.format!r}: {nearest(self.format, _FORMATS)}")
        return _round(kernel, inputs, _FORMATS[self.format])
