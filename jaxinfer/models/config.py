"""What a model is, as numbers: one frozen dataclass that covers every supported family."""

import dataclasses
from typing import Literal

from jaxinfer.ops.rope import RopeConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Top-k mixture of experts in place of the dense feed-forward layer."""

    num_experts: int
    experts_per_token: int
    expert_dim: int
    normalize_weights: bool = True  # rescale the k routing weights of a token to sum to one
    layers: tuple[int, ...] | None = None  # the layers that are mixtures; None is all of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture of a decoder-only Transformer.

    Sizes use the house letters: V vocab, D embed, F mlp, L layers, N query heads, K kv heads, H head_dim.
    """

    family: str
    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float = 1e-6
    activation: Literal["silu", "gelu_tanh"] = "silu"
    rope: RopeConfig = RopeConfig()
    rope_local: RopeConfig | None = None  # for layers with a window; None uses `rope` there too
    windows: tuple[int | None, ...] = ()  # per layer: tokens a query sees, itself included; () is no window anywhere
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head (Qwen3, Gemma 3)
    post_norms: bool = False  # a norm after attention and after the MLP too (Gemma 2, 3)
    embed_scale: float = 1.0
    attention_scale: float | None = None  # None is head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    tie_embeddings: bool = True
    moe: MoeConfig | None = None

    def window(self, layer: int) -> int | None:
        """Return the attention window of `layer` in tokens, or None where it sees the whole context."""
        return self.windows[layer] if self.windows else None

    def layer_rope(self, layer: int) -> RopeConfig:
        """Return the rotary embedding of `layer`: local layers may have their own."""
        local = self.rope_local is not None and self.window(layer) is not None
        return self.rope_local if local else self.rope

    def is_moe(self, layer: int) -> bool:
        """Return whether `layer` has experts instead of a dense MLP."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)


def config_to_dict(config: ModelConfig) -> dict:
    """Return `config` as plain JSON types; `config_from_dict` is its inverse."""
    return dataclasses.asdict(config)


def config_from_dict(d: dict) -> ModelConfig:
    """Rebuild a ModelConfig from `config_to_dict`'s output (lists from JSON become tuples)."""
    d = dict(d)
    d["windows"] = tuple(d["windows"])
    d["rope"] = RopeConfig(**d["rope"])
    d["rope_local"] = RopeConfig(**d["rope_local"]) if d["rope_local"] else None
    if d["moe"]:
        layers = d["moe"]["layers"]
        d["moe"] = MoeConfig(**{**d["moe"], "layers": None if layers is None else tuple(layers)})
    return ModelConfig(**d)
