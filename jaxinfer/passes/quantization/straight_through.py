"""A model as it will be once it is quantized, with gradients: rounding counts as the identity on the way back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.models.transformer import Transformer
from jaxinfer.passes.quantization.rounding import fit_group
from jaxinfer.passes.quantization.weights import NOT_ROUTERS, outputs_first
from jaxinfer.tree import replace, rewrite_by_path


@nnx.dataclass
class RoundedInputs(nnx.Module):
    """A linear map, or experts, given its inputs rounded, each token by its own largest magnitude."""

    node: nnx.Module = nnx.data()
    bits: int = nnx.static(kw_only=True)

    @property
    def kernel(self) -> Any:
        """The map's kernel."""
        return self.node.kernel

    def __call__(self, x: Float[Array, "..."], *group_sizes: Int[Array, "E"]) -> Float[Array, "..."]:
        flat = x if group_sizes else x.reshape(*x.shape[:2], -1)
        return self.node(round_straight_through(flat, self.bits).reshape(x.shape), *group_sizes)


def round_straight_through(x: Float[Array, "*B I"], bits: int) -> Float[Array, "*B I"]:
    """Return each row of x on its symmetric grid of `2^bits - 1` values; the derivative is one (1308.3432)."""
    top = 2.0 ** (bits - 1) - 1
    scale = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / top
    return x + jax.lax.stop_gradient(jnp.round(x / scale) * scale - x)


def fake_quantize(model: Transformer, bits: int, group: int, activation_bits: int) -> Transformer:
    """Return the model with every kernel but the routers' rounded in groups of inputs, and the inputs of each too."""

    def fake(path: str, node: Linear | Experts) -> RoundedInputs:
        turned, kernel, inputs = outputs_first(node)
        run = fit_group(group, kernel.shape, inputs, path)
        outputs = math.prod(kernel.shape[: kernel.ndim - inputs])
        kernel = round_straight_through(kernel.reshape(outputs, -1, run), bits).reshape(kernel.shape)
        node = replace(turned, kernel=kernel.swapaxes(1, 2) if isinstance(node, Experts) else kernel)
        return RoundedInputs(node, bits=activation_bits)

    return rewrite_by_path(model, (Linear, Experts), NOT_ROUTERS, fake)


def cross_entropy(model: Transformer, tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Return the mean nats of every token but the first, given those before it."""
    hidden, _ = model(tokens[:, :-1], model.init_cache(tokens.shape[0], tokens.shape[1] - 1))
    scores = jax.nn.log_softmax(model.logits(hidden), axis=-1)
    return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()
