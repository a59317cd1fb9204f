"""Rotations that are learned on the rounded model: a little better than random ones, for a short training run.

No loss by itself, as in `quarot`, where the learning starts. Apply it before a quantization pass. One step costs a
forward and a backward pass over one window of text, and the rotation of all weights. What is gained is of the size of
the spread between the random rotations that it starts from.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxinfer.cache.dense import Dense
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import Attention, Transformer
from jaxinfer.ops.hadamard import hadamard
from jaxinfer.passes.base import About, Calibrated, is_abstract
from jaxinfer.passes.quantization.cayley import cayley_step
from jaxinfer.passes.quantization.norm_folding import check_float
from jaxinfer.passes.quantization.rotation import DOWN, rotate_inputs, rotate_residual, rotate_values
from jaxinfer.passes.quantization.rotation_nodes import Orthogonal
from jaxinfer.passes.quantization.straight_through import cross_entropy, fake_quantize
from jaxinfer.program import Program
from jaxinfer.tree import replace, rewrite

Rotations = dict[str, Float[Array, "..."]]  # "residual" [D, D], "values" [L, H, H]; what is not rotated is absent


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpinQuant(Calibrated):
    """Minimize the cross-entropy of the rounded model over rotations of the residual stream and of each value head."""

    name: ClassVar[str] = "spinquant"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2405.16406",
        lossless=True,
        degenerate={"residual": False, "values": False, "down": False},
        bound=0.001,
        changes="flops",
        needs=("kernels",),
    )
    wants: ClassVar[tuple[str, ...]] = ()
    residual: bool = True  # learn the residual stream's rotation; a tied table's logits then need it online, D x D
    values: bool = True  # learn each layer's rotation of value heads
    down: bool = True  # a Hadamard transform of the MLP's hidden layer, online, not learned
    bits: int = 4  # of weights while learning
    group: int = 64  # inputs that share a scale while learning; where it does not divide them, the largest below it
    activation_bits: int = 8  # of each token while learning
    steps: int = 64  # one window of the text each
    learning_rate: float = 1.5  # Frobenius norm of a step's generator, falling linearly to nothing
    seed: int = 0  # of the signs of the Hadamard matrices that learning starts from

    def transform(self, program: Program) -> Program:
        """Learn the rotations, and absorb them."""
        for option, least in (("bits", 2), ("activation_bits", 2), ("steps", 0)):
            if getattr(self, option) < least:
                raise InputError(f"{option}={getattr(self, option)}: must be {least} or more")
        check_float(program.model.embed.table)
        rotations = self._start(program.config)
        if rotations and not is_abstract(program.model):
            # A cache that rounds keys is read in a loop, which has no derivative; the rotations don't reach it.
            plain = rewrite(program.model, Attention, ".*", lambda node: replace(node, cache=Dense()))
            rotations = self._learn(plain, rotations)
        return program.replace(model=self._rotate(program.model, rotations))

    def _start(self, config: ModelConfig) -> Rotations:
        rng = np.random.default_rng(self.seed)

        def rotation(size: int) -> np.ndarray:
            return rng.choice([-1.0, 1.0], (size, 1)) * hadamard(size)

        start = {}
        if self.residual:
            start["residual"] = rotation(config.embed_dim)
        if self.values:
            start["values"] = np.stack([rotation(config.head_dim) for _ in range(config.num_layers)])
        return {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}

    def _rotate(self, model: Transformer, rotations: Rotations) -> Transformer:
        if "residual" in rotations:
            model = rotate_residual(model, Orthogonal(rotations["residual"]))
        if "values" in rotations:
            blocks = zip(model.layers, rotations["values"], strict=True)
            model = replace(model, layers=[rotate_values(block, Orthogonal(r)) for block, r in blocks])
        return rotate_inputs(model, DOWN) if self.down else model

    def _learn(self, model: Transformer, rotations: Rotations) -> Rotations:
        @jax.jit
        def step(rotations: Rotations, model: Any, tokens: Array, rate: Array) -> tuple[Array, Rotations]:
            loss, gradients = jax.value_and_grad(self.loss)(rotations, model, tokens)
            return loss, jax.tree.map(lambda r, g: cayley_step(r, g, rate), rotations, gradients)

        tokens = self.calibration.tokens
        with tqdm(total=self.steps, desc=self.name, unit="step", disable=not self.calibration.progress) as bar:
            for i in range(self.steps):
                rate = jnp.float32(self.learning_rate * (1 - i / self.steps))
                loss, rotations = step(rotations, model, tokens[i % len(tokens)][None], rate)
                bar.set_postfix(loss=f"{loss:.3f}")
                bar.update()
        return rotations

    def loss(self, rotations: Rotations, model: Transformer, tokens: Array) -> Float[Array, ""]:
        """Return the mean nats a token of the rotated model with weights and activations rounded."""
        model = jax.tree.map(lambda leaf: leaf, model)  # modules made in this trace, or they can't be rewritten in it
        rounded = fake_quantize(self._rotate(model, rotations), self.bits, self.group, self.activation_bits)
        return cross_entropy(rounded, tokens)
