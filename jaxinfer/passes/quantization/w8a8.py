"""Weights and activations in 8 bits, so that the products are of integers: faster where those are, a little lossier."""

import dataclasses
from typing import Any, ClassVar

import jax

from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.rounding import fit_group, round_to_nearest
from jaxinfer.passes.quantization.weights import WeightOnly, quantize_embedding, quantize_nodes
from jaxinfer.program import Program

_round = jax.jit(round_to_nearest, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class W8A8(WeightOnly):
    """int8 weights, a scale for each output, times int8 activations, scales for each token, summed in int32."""

    name: ClassVar[str] = "w8a8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2206.01861",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.02,
        rounds_activations=True,
        takes="kernels",
    )
    group: int | None = 128  # inputs of a token that share a scale, or the largest divisor below it; none: all of them

    def round(self, kernel, inputs, path):
        """Return the leaf of one kernel."""
        return _round(kernel, inputs, "int8")

    def transform(self, program: Program) -> Program:
        """Round every kernel and put integer products in the place of the linear maps."""

        def fit(leaf: Any, inputs: int) -> int | None:
            return None if self.group is None else fit_group(self.group, leaf.shape, inputs, self.name)

        def linear(leaf, *, eq, **fields):
            inputs = len(eq.split(",")[0]) - 2  # without batch and token
            return DynamicLinear(leaf, eq=eq, group=fit(leaf, inputs), **fields)

        def experts(leaf, **fields):
            return DynamicExperts(leaf, group=fit(leaf, 1), **fields)

        def table(leaf, **fields):
            return DynamicEmbedding(leaf, group=fit(leaf, 1), **fields)

        model = quantize_nodes(program.model, self.where, self.skip, self.round, linear, experts)
        return program.replace(model=quantize_embedding(model, table) if self.embedding else model)
