"""The way back from fused projections: q, k and v, gate and up, each with a kernel of its own.

Lossless. A mesh divides heads and widths, and a kernel in which several lie side by side would be cut across them.
"""

from typing import Any

import jax

from jaxinfer.models.layers import Linear
from jaxinfer.models.transformer import QKV, GateUp
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV
from jaxinfer.tree import replace, rewrite, select


def separate(tree: Any) -> Any:
    """Return the tree without fused projections; abstract trees and quantized kernels work too."""
    if select(tree, FusedQKV):
        tree = rewrite(tree, FusedQKV, ".*", _separate_qkv)
    if select(tree, FusedGateUp):
        tree = rewrite(tree, FusedGateUp, ".*", _separate_gate_up)
    return tree


def _separate_qkv(node: FusedQKV) -> QKV:
    size, K = node.linear.kernel.shape[_outputs(node.linear)], node.num_kv_heads
    q, k, v = _parts(node.linear, (size - 2 * K, K, K))
    axes = tuple("kv_heads" if name == "heads" else name for name in k.axes)
    return QKV(q, replace(k, axes=axes), replace(v, axes=axes))


def _separate_gate_up(node: FusedGateUp) -> GateUp:
    size = node.linear.kernel.shape[_outputs(node.linear)]
    return GateUp(*_parts(node.linear, (size // 2, size // 2)))


def _outputs(linear: Linear) -> int:
    """Return the kernel's axis of heads, or of the mlp's width."""
    return next(i for i, name in enumerate(linear.axes) if name in ("heads", "mlp"))


def _parts(linear: Linear, sizes: tuple[int, ...]) -> list[Linear]:
    """Return maps with so many of the outputs each. An array that the outputs do not cut is shared."""
    axis, total = _outputs(linear), sum(sizes)

    def cut(leaf: Any, axis: int, start: int, size: int) -> Any:
        if axis >= leaf.ndim or leaf.shape[axis] != total:
            return leaf
        take = lambda x: x[(slice(None),) * axis + (slice(start, start + size),)]  # noqa: E731
        return jax.eval_shape(take, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else take(leaf)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(linear)
    parts, start = [], 0
    for size in sizes:
        # Beside the kernel lie leaves by output: a bias, or columns of their own. Their outputs come first.
        new = [
            cut(leaf, axis if getattr(keys[0], "name", keys[0]) == "kernel" else 0, start, size)
            for keys, leaf in leaves
        ]
        parts.append(jax.tree.unflatten(treedef, new))
        start += size
    return parts
