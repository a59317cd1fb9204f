"""Weights in 4 bits and activations in 8, as llama.cpp runs its 4-bit files: int4's bytes at the speed of integers."""

import dataclasses
from typing import ClassVar

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.ops.quantized import RUN
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.int4 import Int4
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicInt4Linear
from jaxinfer.passes.quantization.rounding import fit_group
from jaxinfer.passes.quantization.weights import quantize_embedding, quantize_nodes
from jaxinfer.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class W4A8(Int4):
    """int4's weights, times activations with an int8 scale for each run of 32 inputs; experts keep float activations.

    A kernel whose inputs no multiple of 32 divides keeps float activations too.
    """

    name: ClassVar[str] = "w4a8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2310.19102",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.30,
        rounds_activations=True,
        takes="kernels",
    )

    def transform(self, program: Program) -> Program:
        """Round every kernel and let its products be of integers."""
        if self.group % RUN:
            raise InputError(
                f"w4a8:group={self.group}: must be a multiple of {RUN}, the inputs that share a scale of x"
            )

        def linear(leaf, *, eq, **fields):
            inputs = len(eq.split(",")[0]) - 2  # without batch and token
            whole = fit_group(self.group, leaf.shape, inputs, self.name) % RUN == 0
            return (DynamicInt4Linear if whole else Linear)(leaf, eq=eq, **fields)

        def table(leaf, **fields):
            return DynamicEmbedding(leaf, group=fit_group(128, leaf.shape, 1, self.name), **fields)

        model = quantize_nodes(program.model, self.where, self.skip, self.round, linear)
        return program.replace(model=quantize_embedding(model, table) if self.embedding else model)
