"""The small parts that every block is made of: linear maps, norms and the embedding."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.norm import add_rms_norm, rms_norm
from jaxinfer.ops.quantized import take_rows

Leaf = Any  # an array, a shape (jax.ShapeDtypeStruct), or whatever leaf a pass put in its place
Make = Callable[[tuple[int, ...], jnp.dtype], Leaf]  # how a builder gets a leaf of a shape and dtype
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True)}


@nnx.dataclass
class Linear(nnx.Module):
    """`einsum(eq, x, kernel) + bias`; `axes` names each kernel axis for quantization and sharding."""

    kernel: Leaf = nnx.data()
    bias: Leaf | None = nnx.data(default=None, kw_only=True)
    eq: str = nnx.static(kw_only=True)
    axes: tuple[str, ...] = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        y = einsum(self.eq, x, self.kernel, axes=self.axes)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@nnx.dataclass
class RMSNorm(nnx.Module):
    """Root-mean-square norm; the scale stays float32 (Gemma's `1 + scale` is folded in when it is loaded)."""

    scale: Leaf = nnx.data()
    eps: float = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return rms_norm(x, self.scale, self.eps)

    def after(
        self, x: Float[Array, "*B D"], y: Float[Array, "*B D"]
    ) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
        """Return `x + y` and the norm of it."""
        return add_rms_norm(x, y, self.scale, self.eps)


@nnx.dataclass
class Embedding(nnx.Module):
    """Token vectors; the same table gives the logits of a model with tied embeddings."""

    axes: ClassVar[tuple[str, ...]] = ("vocab", "embed")
    table: Leaf = nnx.data()
    multiplier: float = nnx.static(default=1.0, kw_only=True)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = take_rows(self.table, tokens)
        return x if self.multiplier == 1.0 else x * jnp.asarray(self.multiplier, x.dtype)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return einsum("btd,vd->btv", x, self.table, axes=self.axes)
