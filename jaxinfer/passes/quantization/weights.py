"""Rounding the weights of a program: which nodes, in which order of axes, and what is put in their place.

Every pass that quantizes weights says only how one kernel becomes a leaf; this file does the walk.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Embedding, Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import Quantized, is_quantized
from jaxinfer.passes.base import TAKEN, Technique
from jaxinfer.passes.layout.turn import letters, turn
from jaxinfer.passes.quantization.nodes import QuantizedExperts
from jaxinfer.passes.quantization.rounding import round_to_nearest
from jaxinfer.program import Program
from jaxinfer.tree import replace, rewrite, rewrite_by_path

NOT_ROUTERS = r"(?!.*\.router$).*"  # a router is tiny and its choices are discrete
Round = Callable[[Float[Array, "..."], int, str], Quantized]  # kernel outputs first, input axes, path -> leaf
Make = Callable[..., Any]  # the class of the node that takes a quantized kernel, or what makes one


def outputs_first(node: Linear | Experts) -> tuple[Any, Float[Array, "..."], int]:
    """Return the node with its kernel's outputs first (Experts: the kernel only), that kernel, and its input axes.

    Raises:
        InputError: the kernel is quantized already.
    """
    if is_quantized(node.kernel):
        raise InputError(TAKEN["kernels"])
    if isinstance(node, Experts):
        return node, node.kernel.swapaxes(1, 2), 1
    node = turn(node, inputs_first=False)
    return node, node.kernel, len(letters(node)[0])


def put(node: Linear | Experts, leaf: Quantized, linear: Make = Linear, experts: Make = QuantizedExperts) -> Any:
    """Return the node that holds a quantized kernel, outputs first, in place of a float one."""
    if isinstance(node, Experts):
        return experts(leaf, axes=(node.axes[0], node.axes[2], node.axes[1]))
    node = turn(node, inputs_first=False)
    if linear is Linear:
        return replace(node, kernel=leaf)
    return linear(leaf, bias=node.bias, eq=node.eq, axes=node.axes)


def quantize_nodes(
    tree: Any, where: str, skip: str, round_: Round, linear: Make = Linear, experts: Make = QuantizedExperts
) -> Any:
    """Return the tree with every Linear and Experts that `where` names and `skip` does not, quantized.

    Raises:
        InputError: `where` matches no such node (the paths are listed), or matches one that is quantized already.
    """

    def quantize(path: str, node: Linear | Experts) -> Any:
        if skip and re.fullmatch(skip, path):
            return node
        try:
            node, kernel, inputs = outputs_first(node)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        return put(node, round_(kernel, inputs, path), linear, experts)

    return rewrite_by_path(tree, (Linear, Experts), where, quantize)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightOnly(Technique):
    """A pass that rounds kernels; activations stay as they are."""

    where: str = NOT_ROUTERS  # the linear maps to quantize, by path
    skip: str = ""  # of these, the ones to leave alone
    embedding: bool = True  # the token table too: int8, a scale a row (rows are read as they are, and make the logits)

    def round(self, kernel: Float[Array, "..."], inputs: int, path: str) -> Quantized:
        """Return the leaf of one kernel, whose last `inputs` axes are contracted."""
        raise NotImplementedError

    def transform(self, program: Program) -> Program:
        """Round every kernel to nearest."""
        model = quantize_nodes(program.model, self.where, self.skip, self.round)
        return program.replace(model=quantize_embedding(model) if self.embedding else model)


def quantize_embedding(model: Any, kind: Make | None = None) -> Any:
    """Return the model with its token table in int8; one that is quantized already stays as it is."""

    def quantize(node: Embedding) -> Embedding:
        if is_quantized(node.table):
            return node
        leaf = jax.jit(round_to_nearest, static_argnums=(1, 2))(node.table, 1, "int8")
        return replace(node, table=leaf) if kind is None else kind(leaf, multiplier=node.multiplier)

    return rewrite(model, Embedding, ".*", quantize)
