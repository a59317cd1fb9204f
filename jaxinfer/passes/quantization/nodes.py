"""The nodes that quantization puts in the place of a model's own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.models.layers import Embedding, Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.einsum_integer import einsum_int4_int8, einsum_int8, quantize_rows, sum_groups
from jaxinfer.ops.quantized import codes, dequantize


@nnx.dataclass
class DynamicLinear(Linear):
    """A linear map whose product is of integers: every token is rounded to int8, with scales of its own."""

    group: int | None = nnx.static(default=None, kw_only=True)  # inputs of a token that share a scale; None: all

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        y = einsum_int8(self.eq, x, self.kernel, self.group, axes=self.axes)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@nnx.dataclass
class DynamicEmbedding(Embedding):
    """An embedding whose logits come from an integer product, as in `DynamicLinear`."""

    group: int | None = nnx.static(default=None, kw_only=True)

    def attend(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return einsum_int8("btd,vd->btv", x, self.table, self.group, axes=self.axes)


@nnx.dataclass
class DynamicInt4Linear(Linear):
    """A linear map of 4-bit weights and int8 activations, with scales for each run of 32 of a token's inputs."""

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        y = einsum_int4_int8(self.eq, x, self.kernel, axes=self.axes)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@nnx.dataclass
class QuantizedExperts(Experts):
    """One projection of every expert, stored `[E, out, in]` with the groups of a scale along the inputs."""

    def __call__(self, rows: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        kernel = dequantize(self.kernel, rows.dtype).swapaxes(1, 2)
        y = jax.lax.ragged_dot(rows, kernel, group_sizes, preferred_element_type=jnp.float32)
        return y.astype(rows.dtype)


@nnx.dataclass
class DynamicExperts(QuantizedExperts):
    """Experts whose products are of integers, as in `DynamicLinear`."""

    group: int | None = nnx.static(default=None, kw_only=True)

    def __call__(self, rows: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        values, scale = quantize_rows(rows, self.group)

        def dot(x: Array, kernel: Array) -> Array:
            return jax.lax.ragged_dot(x, kernel.swapaxes(1, 2), group_sizes, preferred_element_type=jnp.int32)

        y = sum_groups(dot, values, scale, codes(self.kernel))
        # Each row's expert: rows are grouped, so the scales repeat as often as their expert has rows.
        by_row = jnp.repeat(self.kernel.scale[:, :, 0], group_sizes, axis=0, total_repeat_length=rows.shape[0])
        return (y * by_row.astype(jnp.float32)).astype(rows.dtype)
