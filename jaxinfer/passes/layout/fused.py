"""Fewer, larger matrix products for the same numbers: q, k, v in one, gate and up in one.

Lossless. It pays where one row is multiplied and the call itself costs (decode on CPU and GPU); a mesh that
shards heads wants the parts separate, so it is applied for one device, at load.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxinfer.models.layers import Linear
from jaxinfer.models.transformer import QKV, GateUp
from jaxinfer.ops.quantized import is_quantized
from jaxinfer.passes.layout.turn import turn
from jaxinfer.tree import replace, rewrite, select


@nnx.dataclass
class FusedQKV(nnx.Module):
    """Query, key and value heads side by side on the kernel's head axis."""

    linear: Linear = nnx.data()
    num_kv_heads: int = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        y, K = self.linear(x), self.num_kv_heads
        return y[:, :, : -2 * K], y[:, :, -2 * K : -K], y[:, :, -K:]


@nnx.dataclass
class FusedGateUp(nnx.Module):
    """Gate and up side by side on the kernel's mlp axis."""

    linear: Linear = nnx.data()

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        return tuple(jnp.split(self.linear(x), 2, axis=-1))


def fuse(tree: Any) -> Any:
    """Return the tree with its q, k, v and its gate and up projections fused; abstract trees work too.

    Quantized kernels are fused where they are of one kind, and stay separate where they are not.
    """
    if select(tree, QKV):
        tree = rewrite(tree, QKV, ".*", _fuse_qkv)
    if select(tree, GateUp):  # a mixture of experts has none
        tree = rewrite(tree, GateUp, ".*", _fuse_gate_up)
    return tree


def _fuse_qkv(node: QKV) -> QKV | FusedQKV:
    linear = _side_by_side([node.q, node.k, node.v])
    kv_heads = node.k.kernel.shape[node.k.axes.index("kv_heads")]
    return node if linear is None else FusedQKV(linear, num_kv_heads=kv_heads)


def unfuse_qkv(node: FusedQKV) -> QKV | FusedQKV:
    """Return q, k and v as maps of their own; the node as it is where what it holds can't be cut into heads."""
    linear, K = node.linear, node.num_kv_heads
    axis = linear.axes.index("heads")
    heads = linear.kernel.shape[axis]
    parts = jax.tree.leaves(linear.kernel)
    more = set(type(linear).__dataclass_fields__) - {"kernel", "bias", "eq", "axes", "group"}  # outliers, for one
    if more or any(part.shape[axis] != heads for part in parts):
        return node

    def cut(start: int, end: int, name: str) -> Linear:
        at = (slice(None),) * axis + (slice(start, end),)
        kernel = jax.tree.map(lambda part: part[at], linear.kernel)
        bias = None if linear.bias is None else linear.bias[start:end]
        axes = tuple(name if i == axis else a for i, a in enumerate(linear.axes))
        return replace(linear, kernel=kernel, bias=bias, axes=axes)

    q, k = heads - 2 * K, heads - K
    return QKV(cut(0, q, "heads"), cut(q, k, "kv_heads"), cut(k, heads, "kv_heads"))


def _fuse_gate_up(node: GateUp) -> GateUp | FusedGateUp:
    linear = _side_by_side([node.gate, node.up])
    return node if linear is None else FusedGateUp(linear)


def _side_by_side(parts: list[Linear]) -> Linear | None:
    """Return one map with the outputs of all; None where their kernels are stored in different ways."""
    quantized = any(is_quantized(p.kernel) for p in parts)
    if quantized and len({_kind(p.kernel) for p in parts}) > 1:
        return None
    # Quantized kernels have their outputs first, and the groups that share a scale along their inputs.
    parts = [turn(p, inputs_first=not quantized) for p in parts]
    first, axis = parts[0], 0 if quantized else 1  # the axis of heads, or of the mlp's width
    kernel = jax.tree.map(lambda *leaves: _concatenate(leaves, axis), *(p.kernel for p in parts))
    bias = None if first.bias is None else _concatenate([p.bias for p in parts], axis=0)
    return Linear(kernel, bias=bias, eq=first.eq, axes=first.axes)


def _kind(kernel: Any) -> tuple:
    """Return what quantized kernels must have in common to be put side by side: everything but their outputs."""
    return jax.tree.structure(kernel), *(part.shape[1:] for part in jax.tree.leaves(kernel))


def _concatenate(leaves: Sequence, axis: int):
    host = isinstance(leaves[0], np.ndarray)
    join = lambda *xs: (np if host else jnp).concatenate(xs, axis=axis)  # noqa: E731
    abstract = isinstance(leaves[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(join, *leaves) if abstract else join(*leaves)
