"""Hadamard rotations that hide outliers, so that 4 bits do: no loss by itself, a few cheap transforms a token.

Apply it before a quantization pass: one that rounds activations, or for weights alone `gptq`. Rounding weights to
nearest can lose more after it than before, since norm gains, which hold large channels down, are then inside the
groups that share a scale. The transforms of the residual stream and of values are absorbed into the weights; the one
before the MLP's down projection, and those that the options add, run online in O(n log n).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jaxinfer.passes.base import About, Technique
from jaxinfer.passes.quantization.rotation import (
    DOWN,
    O,
    rotate_inputs,
    rotate_keys,
    rotate_residual,
    rotate_values,
)
from jaxinfer.passes.quantization.rotation_nodes import SignedHadamard
from jaxinfer.program import Program
from jaxinfer.tree import replace


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuaRot(Technique):
    """Rotate the residual stream, the MLP's hidden layer, and heads, by Hadamard matrices with random signs."""

    name: ClassVar[str] = "quarot"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2404.00456",
        lossless=True,
        degenerate={"residual": False, "down": False, "values": False, "heads": False, "keys": False},
        bound=0.001,
        changes="flops",
        needs=("kernels",),
    )
    residual: bool = True  # the residual stream: what qkv, gate, up and the logits read
    down: bool = True  # the MLP's hidden layer, online
    values: bool = True  # each value head: what the cache holds, and what o reads
    heads: bool = False  # all of what o reads at once, online
    keys: bool = False  # each key head after the rotary embedding, and its queries, online: for quantized caches
    seed: int = 0  # of the random signs

    def transform(self, program: Program) -> Program:
        """Rotate; `values` before `heads`, which closes the way into o."""
        model = program.model
        rng = np.random.default_rng(self.seed)
        if self.residual:
            model = rotate_residual(model, _random_hadamard(rng, model.config.embed_dim))
        if self.values:
            rotation = _random_hadamard(rng, model.config.head_dim)
            model = replace(model, layers=[rotate_values(block, rotation) for block in model.layers])
        if self.heads:
            model = rotate_inputs(model, O)
        if self.down:
            model = rotate_inputs(model, DOWN)
        if self.keys:
            model = rotate_keys(model)
        return program.replace(model=model)


def _random_hadamard(rng: np.random.Generator, size: int) -> SignedHadamard:
    return SignedHadamard(jnp.asarray(rng.choice([-1.0, 1.0], size), jnp.float32))
