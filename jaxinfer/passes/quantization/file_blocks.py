"""Weights in the blocks of the file that they come from: its bytes and nothing lost, where the file is quantized."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models.layers import Embedding, Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import FOUR_BIT, Packed, is_quantized
from jaxinfer.passes.quantization.weights import outputs_first, put
from jaxinfer.tree import path_of, replace, rewrite_by_path

BLOCK = 32  # numbers that share a scale in every kind of block that is kept


def hold_blocks(tree: Any, kinds: Mapping[str, str]) -> Any:
    """Return a tree of shapes with `Packed` kernels and tables, outputs first, in place of the leaves in `kinds`.

    `kinds` has the qtype of each by its path. A kernel whose last axis would cut blocks (heads of another size than a
    multiple of 32, of the output projection) stays a float one.
    """

    def hold(path: str, node: Linear | Experts | Embedding) -> Any:
        name = "table" if isinstance(node, Embedding) else "kernel"
        qtype = kinds.get(f"{path}.{name}")
        if qtype is None:
            return node
        if isinstance(node, Embedding):
            return node if node.table.shape[-1] % BLOCK else replace(node, table=_shapes(node.table, qtype))
        kernel = jax.eval_shape(lambda n: outputs_first(n)[1], node)
        return node if kernel.shape[-1] % BLOCK else put(node, _shapes(kernel, qtype))

    return rewrite_by_path(tree, (Linear, Experts, Embedding), ".*", hold)


def held_blocks(model: Any) -> dict[str, str]:
    """Return the `kinds` with which `hold_blocks` makes a tree like `model`, which is in its plain layout."""
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)[0]
    return {path_of(keys): leaf.qtype for keys, leaf in leaves if is_quantized(leaf)}


def _shapes(weight: jax.ShapeDtypeStruct, qtype: str) -> Packed:
    *rest, last = weight.shape
    codes = (*rest, last // 2) if qtype in FOUR_BIT else weight.shape
    values = jax.ShapeDtypeStruct(codes, jnp.uint8 if qtype in FOUR_BIT else jnp.int8)
    scale = jax.ShapeDtypeStruct((*rest, last // BLOCK), jnp.float16)
    return Packed(values, scale, scale if qtype == "uint4" else None, qtype=qtype, dtype=jnp.dtype(weight.dtype))
