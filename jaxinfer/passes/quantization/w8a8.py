"""Weights and activations in 8 bits, so that the products are of integers: faster where those are, a little lossier."""

import dataclasses
from typing import ClassVar

import jax

from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.rounding import round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly, quantize_embedding, quantize_nodes
from jaxinfer.program import Program

_round = jax.jit(round_to_nearest, static_argnums=(1, 2, 3, 4))


@dataclasses.dataclass(frozen=True, kw_only=True)
class W8A8(WeightOnly):
    """int8 weights, a scale for each output, times int8 activations, a scale for each token, summed in int32."""

    name: ClassVar[str] = "w8a8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2206.01861",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.02,
        takes="kernels",
    )
    clip: bool = False  # search the range that rounds a weight with the least squared error

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        return _round(kernel, inputs, "int8", None, self.clip)

    def transform(self, program: Program) -> Program:
        """Round every kernel and put integer products in the place of the linear maps."""
        model = quantize_nodes(program.model, self.where, self.skip, self.round, DynamicLinear, DynamicExperts)
        return program.replace(model=quantize_embedding(model, DynamicEmbedding) if self.embedding else model)
