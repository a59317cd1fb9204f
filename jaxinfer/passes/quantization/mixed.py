"""Four bits where it does not hurt, eight where it does: the best quality at a size between int4's and int8's."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import Quantized, dequantize
from jaxinfer.passes.base import About, Calibrated, Technique, is_abstract
from jaxinfer.passes.calibration import survey
from jaxinfer.passes.quantization.rounding import fit_group, round_to_nearest
from jaxinfer.passes.quantization.weights import NOT_ROUTERS, outputs_first, quantize_embedding, quantize_nodes
from jaxinfer.program import Program
from jaxinfer.tree import select

_round = jax.jit(round_to_nearest, static_argnums=(1, 2, 3))
Sizes = dict[str, int]  # weights of each kernel, by path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(Calibrated):
    """Round every kernel to int4 in groups, but those to int8 whose outputs change most for the bytes they save.

    A kernel's sensitivity is how much of its outputs' energy rounding to 4 bits loses and 8 bits would keep,
    `(tr D4 H D4^T - tr D8 H D8^T) / tr W H W^T` with H the mean of x x^T and D the rounding error, for each weight.
    """

    name: ClassVar[str] = "mixed"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2310.10944",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.20,
        takes="kernels",
    )
    wants: ClassVar[tuple[str, ...]] = ("hessian",)
    where: str = NOT_ROUTERS  # the linear maps to quantize, by path
    skip: str = ""  # of these, the ones to leave alone
    embedding: bool = True  # the token table too: int8, a scale a row (rows are read as they are, and make the logits)
    group: int = 64  # inputs that share a scale; where it does not divide them, the largest divisor below it
    bits: float = 5.0  # mean bits of a weight in these kernels, scales not counted: the size budget
    plan: tuple[str, ...] = ()  # the kernels in int8, by path; empty: choose them by their sensitivity

    def __call__(self, program: Program) -> Program:
        """Choose the kernels, unless there is a plan, and apply it.

        Raises:
            InputError: `bits` is not in 4..8, there is no calibration text, or a pass before forbids this one.
        """
        if not 4 <= self.bits <= 8:
            raise InputError(f"mixed:bits={self.bits}: must be in 4..8")
        self.check(program)
        if self.plan:
            return Technique.__call__(self, program)  # what is planned needs no text
        sizes = self._sizes(program.model)
        if is_abstract(program.model):  # which ones is not known, but how many bytes
            return self._planned(list(sizes), sizes)(program)
        if self.calibration is None or not sizes:
            return super().__call__(program)  # which raises, or has nothing to do
        losses = survey(program.model, self.calibration, self.wants, self._losses, "sensitivity")
        by_path = {f"layers.{i}.{path}": float(loss) for i, of in enumerate(losses) for path, loss in of.items()}
        # What no text was measured for (an untied unembedding) comes first: every token's logits pass through it.
        order = sorted(sizes, key=lambda path: -by_path.get(path, float("inf")) / sizes[path])
        return self._planned(order, sizes)(program)

    def transform(self, program: Program) -> Program:
        """Round every kernel as planned."""
        model = quantize_nodes(program.model, self.where, self.skip, self._round)
        return program.replace(model=quantize_embedding(model) if self.embedding else model)

    def _round(self, kernel: Float[Array, "..."], inputs: int, path: str) -> Quantized:
        if path in self.plan:
            return _round(kernel, inputs, "int8", None)
        return _round(kernel, inputs, "int4", fit_group(self.group, kernel.shape, inputs, path))

    def _sizes(self, model: Any) -> Sizes:
        nodes = select(model, (Linear, Experts), self.where).items()
        return {path: node.kernel.size for path, node in nodes if not (self.skip and re.fullmatch(self.skip, path))}

    def _planned(self, order: list[str], sizes: Sizes) -> "Mixed":
        """Return this pass with a plan: the first kernels of `order` that fit in the budget."""
        room, plan = (self.bits - 4) * sum(sizes.values()), []
        for path in order:
            if 4 * sizes[path] <= room:
                plan.append(path)
                room -= 4 * sizes[path]
        return dataclasses.replace(self, plan=tuple(plan) or ("none",))

    def _losses(self, block: Any, stats: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
        """Return the sensitivity of each kernel of a layer."""
        losses = {}
        for path, node in select(block, (Linear, Experts)).items():
            _, kernel, inputs = outputs_first(node)
            group = fit_group(self.group, kernel.shape, inputs, path)
            flat = kernel.reshape(*kernel.shape[: kernel.ndim - inputs], -1).astype(jnp.float32)
            energy = _energy(flat, stats[path]["hessian"])
            lost = [
                _energy(flat - dequantize(round_to_nearest(kernel, inputs, *how), jnp.float32).reshape(flat.shape),
                        stats[path]["hessian"])
                for how in (("int4", group), ("int8", None))
            ]  # fmt: skip
            losses[path] = (lost[0] - lost[1]) / jnp.maximum(energy, 1e-30)
        return losses


def _energy(w: Float[Array, "... I"], hessian: Float[Array, "*E I I"]) -> Float[Array, ""]:
    """Return `tr W H W^T`, summed over experts where there are any."""
    if hessian.ndim == 3:
        return jnp.einsum("eoi,eij,eoj->", w, hessian, w)
    w = w.reshape(-1, w.shape[-1])
    return ((w @ hessian) * w).sum()
