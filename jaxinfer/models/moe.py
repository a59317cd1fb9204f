"""Top-k mixture of experts (Qwen3-MoE, Mixtral): each token runs only the experts that its router picks."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import ACTIVATIONS, Leaf, Linear, Make


@nnx.dataclass
class Experts(nnx.Module):
    """One projection of every expert, `[E, in, out]`, applied to rows grouped by expert."""

    kernel: Leaf = nnx.data()
    axes: tuple[str, ...] = nnx.static(kw_only=True)

    def __call__(self, rows: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        y = jax.lax.ragged_dot(rows, self.kernel, group_sizes, preferred_element_type=jnp.float32)
        return y.astype(rows.dtype)


@nnx.dataclass
class MoE(nnx.Module):
    """`sum_e w_e * down_e(activation(gate_e(x)) * up_e(x))` over the k experts of largest router probability."""

    router: Linear = nnx.data()
    gate: Experts = nnx.data()
    up: Experts = nnx.data()
    down: Experts = nnx.data()
    experts_per_token: int = nnx.static(kw_only=True)
    normalize_weights: bool = nnx.static(kw_only=True)
    activation: str = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        weights, experts = self.route(x)  # B*T k
        k, E = self.experts_per_token, self.gate.kernel.shape[0]
        order = jnp.argsort(experts.reshape(-1), stable=True)  # rows of one expert become neighbours
        rows = x.reshape(B * T, D)[order // k]
        group_sizes = jnp.bincount(experts.reshape(-1), length=E).astype(jnp.int32)
        hidden = ACTIVATIONS[self.activation](self.gate(rows, group_sizes)) * self.up(rows, group_sizes)
        out = self.down(hidden, group_sizes) * weights.reshape(-1)[order][:, None].astype(x.dtype)
        back = jnp.argsort(order)  # a gather, where scatter-add would be slow on CPU
        return out[back].reshape(B, T, k, D).sum(axis=2)

    def route(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """Return each token's k routing weights and experts; softmax in float32 over all experts, then top-k."""
        scores = self.router(x).astype(jnp.float32).reshape(-1, self.gate.kernel.shape[0])
        weights, experts = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), self.experts_per_token)
        if self.normalize_weights:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return weights, experts


def build_moe(config: ModelConfig, make: Make, dtype: DTypeLike) -> MoE:
    """Return the mixture of one layer with leaves made by `make(shape, dtype)`."""
    m, D = config.moe, config.embed_dim
    wide = ("experts", "embed", "mlp")
    return MoE(
        Linear(make((D, m.num_experts), dtype), eq="btd,de->bte", axes=("embed", "experts")),
        Experts(make((m.num_experts, D, m.expert_dim), dtype), axes=wide),
        Experts(make((m.num_experts, D, m.expert_dim), dtype), axes=wide),
        Experts(make((m.num_experts, m.expert_dim, D), dtype), axes=("experts", "mlp", "embed")),
        experts_per_token=m.experts_per_token,
        normalize_weights=m.normalize_weights,
        activation=config.activation,
    )
