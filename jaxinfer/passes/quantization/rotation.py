"""Orthogonal changes of basis that leave a model's function as it is: of the residual stream, of heads, of the MLP.

A rotation spreads an outlier channel over all channels, so that what is rounded afterwards has a smaller range. It is
absorbed into the kernels on both sides where nothing that minds it lies between; elsewhere it runs online.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear, RMSNorm
from jaxinfer.models.moe import Experts
from jaxinfer.models.transformer import Attention, Transformer
from jaxinfer.ops.hadamard import hadamard, hadamard_transform
from jaxinfer.passes.layout.fused import FusedQKV
from jaxinfer.passes.layout.turn import letters, turn
from jaxinfer.passes.quantization.norm_folding import check_float, embed_axis, fold_norms
from jaxinfer.passes.quantization.rotation_nodes import (
    HadamardExperts,
    HadamardLinear,
    Orthogonal,
    RotatedKeys,
    RotatedNorm,
    SignedHadamard,
)
from jaxinfer.tree import replace, rewrite, rewrite_by_path

Rotation = SignedHadamard | Orthogonal
DOWN, O = r"layers\.\d+\.mlp\.down(\.\w+)*", r"layers\.\d+\.attention\.o(\.\w+)*"


def rotate_residual(model: Transformer, rotation: Rotation) -> Transformer:
    """Return the model with its residual stream in another basis, `x R`, and the same logits.

    Norm gains are folded first, since `norm(x R) = norm(x) R` only without them. Kernels that read the stream become
    `R^T W`, those that write it `W R`, the embedding's rows `e R`. Two norms keep their gain and rotate online: the
    final one where embedding and logits share a table, which would otherwise be stored twice, and norms after a layer.

    Raises:
        InputError: a kernel is quantized.
    """
    model = fold_norms(model)
    embed = replace(model.embed, table=absorb(model.embed.table, 1, rotation))
    layers = [_rotate_block(block, rotation) for block in model.layers]
    if model.unembed is None:
        return replace(model, embed=embed, layers=layers, final_norm=_rotated(model.final_norm, rotation, True))
    return replace(model, embed=embed, layers=layers, unembed=_rotate_stream(model.unembed, rotation))


def rotate_values(block: Any, rotation: Rotation) -> Any:
    """Return the layer with every value head `v R`, and `R^T` in the output projection: attention is linear in v.

    Raises:
        InputError: a kernel is quantized, or a rotation runs before the output projection.
    """
    attention = block.attention
    if not isinstance(attention.o, Linear):
        raise InputError("values: the output projection has an online rotation before it; rotate the values first")
    if isinstance(attention.qkv, FusedQKV):
        qkv = replace(attention.qkv, linear=_rotate_heads(attention.qkv.linear, rotation, attention.num_kv_heads))
    else:
        qkv = replace(attention.qkv, v=_rotate_heads(attention.qkv.v, rotation, attention.num_kv_heads))
    axis = attention.o.axes.index("head_dim")
    o = replace(attention.o, kernel=absorb(attention.o.kernel, axis, rotation))
    return replace(block, attention=replace(attention, qkv=qkv, o=o))


def rotate_inputs(model: Transformer, where: str) -> Transformer:
    """Return the model with a Hadamard transform before the linear maps and experts at `where`, which absorb it.

    Raises:
        InputError: a kernel is quantized, or the number of its inputs has no known Hadamard matrix.
    """

    def wrap(path: str, node: Linear | Experts) -> HadamardLinear | HadamardExperts:
        if isinstance(node, Experts):
            return HadamardExperts(replace(node, kernel=absorb(node.kernel, 1, hadamard_transform)))
        check_float(node.kernel)
        first = turn(node, inputs_first=True)
        inputs = len(letters(node)[0])
        matrix = first.kernel.reshape(-1, *first.kernel.shape[inputs:])
        try:
            kernel = absorb(matrix, 0, hadamard_transform).reshape(first.kernel.shape)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        return HadamardLinear(turn(replace(first, kernel=kernel), inputs_first=node.eq == first.eq))

    return rewrite_by_path(model, (Linear, Experts), where, wrap)


def rotate_keys(model: Transformer) -> Transformer:
    """Return the model with a Hadamard transform on every query and on every key before it is cached.

    Raises:
        InputError: the head dimension has no known Hadamard matrix.
    """

    def wrap(node: Attention) -> Attention:
        hadamard(node.head_dim)
        return RotatedKeys(**{name: getattr(node, name) for name in type(node).__dataclass_fields__})

    return rewrite(model, Attention, ".*", wrap)


def absorb(w: Float[Array, "..."], axis: int, rotation: Any) -> Float[Array, "..."]:
    """Return a weight with `rotation` applied along one axis, computed in float32.

    Raises:
        InputError: the weight is quantized.
    """
    rotated = rotation(jnp.moveaxis(check_float(w).astype(jnp.float32), axis, -1))
    return jnp.moveaxis(rotated, -1, axis).astype(w.dtype)


def _rotate_block(block: Any, rotation: Rotation) -> Any:
    changes = {}
    for part in ("attention", "mlp"):
        norm = f"{part}_post_norm"
        after = getattr(block, norm, None)
        if after is not None:
            changes[norm] = _rotated(after, rotation, False)
        changes[part] = rewrite(
            getattr(block, part),
            (Linear, Experts),
            ".*",
            lambda node, apart=after is not None: _rotate_stream(node, rotation, writers=not apart),
        )
    return replace(block, **changes)


def _rotate_stream(node: Linear | Experts, rotation: Rotation, writers: bool = True) -> Linear | Experts:
    axis, writes = embed_axis(node)
    if axis is None or (writes and not writers):
        return node
    bias = getattr(node, "bias", None)
    kernel = absorb(node.kernel, axis, rotation)
    if bias is None or not writes:
        return replace(node, kernel=kernel)
    return replace(node, kernel=kernel, bias=absorb(bias, bias.ndim - 1, rotation))


def _rotated(norm: RMSNorm, rotation: Rotation, rotated_input: bool) -> RotatedNorm:
    before = norm.rotations if isinstance(norm, RotatedNorm) else []
    return RotatedNorm(norm.scale, eps=norm.eps, rotations=[*before, rotation], rotated_input=rotated_input)


def _rotate_heads(node: Linear, rotation: Rotation, count: int) -> Linear:
    """Rotate the last `count` heads that a projection produces."""
    dim = node.axes.index("head_dim")
    heads = next(i for i, name in enumerate(node.axes) if name in ("heads", "kv_heads"))

    def rotate(w: Array, heads: int, dim: int) -> Array:
        rest, last = jnp.split(w, [w.shape[heads] - count], axis=heads)
        return jnp.concatenate([rest, absorb(last, dim, rotation)], axis=heads)

    bias = None if node.bias is None else rotate(node.bias, 0, 1)
    return replace(node, kernel=rotate(check_float(node.kernel), heads, dim), bias=bias)
