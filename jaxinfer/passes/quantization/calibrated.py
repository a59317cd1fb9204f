"""What the quantizers that calibrate share: which nodes they round, and what becomes of the token table."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import jax

from jaxinfer.models.layers import Embedding, Linear
from jaxinfer.models.moe import Experts
from jaxinfer.models.transformer import Transformer
from jaxinfer.passes.base import Calibrated
from jaxinfer.passes.quantization.nodes import QuantizedExperts
from jaxinfer.passes.quantization.rounding import round_to_nearest
from jaxinfer.passes.quantization.weights import NOT_ROUTERS, quantize_embedding, quantize_nodes
from jaxinfer.program import Program
from jaxinfer.tree import replace, rewrite_by_path, select

round_int8 = jax.jit(round_to_nearest, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibratedWeights(Calibrated):
    """A pass that rounds the kernels of each layer by what their inputs look like.

    Outside of the layers there is only the token table (and its untied twin), which nothing is measured for.
    """

    linear: ClassVar[type[Linear]] = Linear  # the nodes that hold rounded kernels
    experts: ClassVar[type[Experts]] = QuantizedExperts
    table: ClassVar[type[Embedding] | None] = None
    rounding: ClassVar[bool] = True  # a field where a pass can do without
    where: str = NOT_ROUTERS  # the linear maps to quantize, by path
    skip: str = ""  # of these, the ones to leave alone
    embedding: bool = True  # the token table too, and an untied unembedding: int8, a scale a row

    def transform(self, program: Program) -> Program:
        """Visit every layer, then round the token table to nearest."""
        # A pattern may match nothing in some layers, but not in all of them.
        rewrite_by_path(program.model, (Linear, Experts), self.where, lambda _, node: node)
        model = program.model
        model = self.sweep(model, self.visit_chosen, functools.partial(self.choose, model))
        program = program.replace(model=model)
        if not (self.embedding and self.rounding):
            return program
        model = quantize_embedding(program.model, self.table)
        if isinstance(model.unembed, Linear):
            head = quantize_nodes([model.unembed], ".*", "", lambda w, n, _: round_int8(w, n, "int8"), self.linear)[0]
            model = replace(model, unembed=head)
        return program.replace(model=model)

    def choose(self, model: Transformer, index: int) -> frozenset[str]:
        """Return the paths in layer `index` of the linear maps that the options name."""
        nodes = select(model.layers[index], (Linear, Experts))
        return frozenset(path for path in nodes if self.chooses(f"layers.{index}.{path}"))

    def visit_chosen(self, block: Any, stats: Any, chosen: frozenset[str]) -> Any:
        """Visit a layer with the maps to round named by their paths in it."""
        where = "|".join(map(re.escape, sorted(chosen))) or "(?!)"
        return dataclasses.replace(self, where=where, skip="").visit(block, stats)

    def chooses(self, path: str) -> bool:
        """Return whether the linear map at this path is to be rounded."""
        return bool(re.fullmatch(self.where, path)) and not re.fullmatch(self.skip or "(?!)", path)

    def quantize(self, block: Any, round_: Callable[..., Any]) -> Any:
        """Return a layer with `round_(kernel, inputs, path)` in place of the kernels that the options name."""
        if not select(block, (Linear, Experts), self.where):
            return block
        return quantize_nodes(block, self.where, self.skip, round_, self.linear, self.experts)
