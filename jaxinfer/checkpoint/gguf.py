"""A GGUF file's metadata as a model's configuration.

Two things are left to the name table, because they concern single leaves: files of the "llama" architecture hold the
rows of q and k with rotary pairs side by side, and Gemma's norms have the one added to their weights already.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType as Type

from jaxinfer.checkpoint.gguf_header import Header, TensorInfo
from jaxinfer.checkpoint.gguf_tensors import read_tensor
from jaxinfer.checkpoint.hf_keys import REQUIRED, Keys
from jaxinfer.errors import InputError, nearest
from jaxinfer.models.config import ModelConfig, MoeConfig
from jaxinfer.ops.rope import RopeConfig

_FAMILIES = {
    "llama": "llama",  # Mistral and SmolLM2 too; Mixtral where it has experts
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
}
# The layers of the two largest Gemmas, whose attention is scaled by embed_dim / num_heads instead of by head_dim.
# The file does not say so; llama.cpp knows them by their depth as well.
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}


class _Metadata(Keys):
    """Typed look-up of one architecture's keys, which are written without its name."""

    def __init__(self, header: Header, architecture: str, path: Path):
        found = {k: v for k, v in header.metadata.items() if k.startswith(architecture + ".")}
        super().__init__({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()}, path)
        self.architecture = architecture

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        return super().get(f"{self.architecture}.{key}", default)

    def fail(self, key: str, constraint: str) -> InputError:
        prefix = self.architecture + "."
        return super().fail(key if key.startswith(prefix) else prefix + key, constraint)


def config_from_gguf(header: Header, path: str | Path) -> ModelConfig:
    """Return the configuration that the metadata and the tensors of the file at `path` describe.

    Rotary scaling: linear and yarn come from the metadata; Llama 3's comes from the tensor rope_freqs.weight, where its
    factors are those of Llama 3.1 and later (low 1, high 4, 8192 tokens, any factor), and is refused otherwise.

    Raises InputError, naming the file and the key, for an architecture that is not supported, a key that is missing
    or has the wrong type, and sizes that contradict each other or the tensors.
    """
    path = Path(path)
    architecture = header.metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        shown = "missing" if architecture is None else f"{architecture!r:.80}"
        hint = nearest(architecture, _FAMILIES) if isinstance(architecture, str) else "known: " + ", ".join(_FAMILIES)
        raise InputError(f"{path}: general.architecture is {shown}, which is not supported; {hint}")
    keys = _Metadata(header, architecture, path)
    gemma = architecture.startswith("gemma")
    D, L, N = keys.integer("embedding_length"), keys.integer("block_count"), keys.integer("attention.head_count")
    if len(header.tensors) < L:
        raise keys.fail("block_count", f"but the file has {len(header.tensors)} tensors, less than one a layer")
    K = keys.integer("attention.head_count_kv", N)
    if N % K:
        raise keys.fail("attention.head_count_kv", f"which does not divide attention.head_count, {N}")
    H = _head_dim(keys, D, N)
    F, moe = _feed_forward(keys, architecture)
    windows = _windows(keys, architecture, L)
    family = "mixtral" if moe and architecture == "llama" else _FAMILIES[architecture]
    return ModelConfig(
        family=family,
        vocab_size=_vocab_size(header, keys, D),
        embed_dim=D,
        mlp_dim=F,
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        max_context=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        activation="gelu_tanh" if gemma else "silu",
        rope=_rope(keys, header, path, H),
        rope_local=RopeConfig(theta=keys.number("rope.freq_base_swa", 10_000.0)) if architecture == "gemma3" else None,
        windows=windows,
        qkv_bias="blk.0.attn_q.bias" in header.tensors,
        out_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_down.bias" in header.tensors,
        qk_norm=architecture in ("qwen3", "qwen3moe", "gemma3"),
        post_norms=gemma,
        embed_scale=D**0.5 if gemma else 1.0,
        attention_scale=(D / N if _GEMMA_27B_LAYERS[architecture] == L else H) ** -0.5 if gemma else None,
        attention_softcap=keys.number("attn_logit_softcapping", 50.0) if architecture == "gemma2" else None,
        final_softcap=keys.number("final_logit_softcapping", {"gemma2": 30.0}.get(architecture)) if gemma else None,
        tie_embeddings="output.weight" not in header.tensors,
        moe=moe,
    )


def _vocab_size(header: Header, keys: Keys, embed_dim: int) -> int:
    table = header.tensors.get("token_embd.weight")
    if table is None:
        raise InputError(f"{keys.path}: has no tensor 'token_embd.weight', which every model has; convert it again")
    if len(table.shape) != 2 or table.shape[1] != embed_dim:
        raise keys.fail("embedding_length", f"but tensor 'token_embd.weight' has the shape {table.shape}")
    return table.shape[0]


def _head_dim(keys: Keys, embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads and keys.get("attention.key_length", None) is None:
        raise keys.fail("attention.head_count", f"which does not divide embedding_length, {embed_dim}")
    size = keys.integer("attention.key_length", embed_dim // num_heads)
    if size % 2:
        raise keys.fail("attention.key_length", f"so a head has {size} dimensions, and rotary embedding needs pairs")
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, size) != size:
            raise keys.fail(key, f"and only files where it equals the size of a head, {size}, are supported")
    return size


def _feed_forward(keys: Keys, architecture: str) -> tuple[int, MoeConfig | None]:
    """Return the width of a dense layer's MLP and the mixture of experts, if there is one."""
    experts = keys.integer("expert_count", REQUIRED if architecture == "qwen3moe" else 0, low=0)
    if not experts:
        return keys.integer("feed_forward_length"), None
    k = keys.integer("expert_used_count")
    if k > experts:
        raise keys.fail("expert_used_count", f"which is more than expert_count, {experts}")
    if architecture == "llama":
        mlp_dim = expert_dim = keys.integer("feed_forward_length")
    else:
        expert_dim = keys.integer("expert_feed_forward_length")
        mlp_dim = keys.integer("feed_forward_length", expert_dim)
    return mlp_dim, MoeConfig(num_experts=experts, experts_per_token=k, expert_dim=expert_dim)


def _windows(keys: Keys, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Return each layer's window: of Gemma 2 every other layer is global, of Gemma 3 every sixth."""
    if not architecture.startswith("gemma"):
        return ()
    window = keys.integer("attention.sliding_window")
    period = 2 if architecture == "gemma2" else keys.integer("attention.sliding_window_pattern", 6)
    return tuple(None if (i + 1) % period == 0 else window for i in range(num_layers))


def _rope(keys: Keys, header: Header, path: Path, head_dim: int) -> RopeConfig:
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.get("rope.scaling.type", "linear")  # what llama.cpp takes a bare factor for
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))
    if "rope_freqs.weight" in header.tensors:
        if factor != 1.0:
            raise keys.fail("rope.scaling.factor", "but tensor 'rope_freqs.weight' scales the frequencies already")
        return _llama3_rope(header.tensors["rope_freqs.weight"], path, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind != "yarn":
        raise keys.fail("rope.scaling.type", "and the supported kinds are none, linear and yarn")
    attention = keys.number("rope.scaling.attn_factor", None)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=keys.integer("rope.scaling.original_context_length", keys.integer("context_length")),
        beta_fast=keys.number("rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=keys.number("rope.scaling.yarn_beta_slow", 1.0),
        # llama.cpp multiplies the factor of the file with the one that yarn derives
        attention_factor=None if attention is None else attention * (1.0 + 0.1 * math.log(max(factor, 1.0))),
    )


def _llama3_rope(info: TensorInfo, path: Path, theta: float, head_dim: int) -> RopeConfig:
    """Recover Llama 3's scaling from what the file keeps of it: the divisor of each frequency."""
    fix = "convert the model from its Hugging Face checkpoint, or load that one"
    if info.type != Type.F32 or info.shape != (head_dim // 2,):
        raise InputError(
            f"{path}: tensor 'rope_freqs.weight' is {info.type.name} of shape {info.shape}, "
            f"expected F32 of shape ({head_dim // 2},); {fix}"
        )
    divisors = read_tensor(info, path)
    factor = float(divisors.max())
    if (divisors == 1.0).all():
        return RopeConfig(theta=theta)
    low, high, original = 1.0, 4.0, 8192
    turns = original / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if not 1.0 < factor < 1e6 or not np.allclose(divisors, 1.0 / ((1.0 - blend) / factor + blend), rtol=1e-3):
        raise InputError(
            f"{path}: tensor 'rope_freqs.weight' divides frequencies by up to {factor:.4g}, "
            f"but not as Llama 3.1 does (low {low}, high {high}, {original} tokens); {fix}"
        )
    return RopeConfig(
        theta=theta, kind="llama3", factor=factor, original_context=original, low_freq_factor=low, high_freq_factor=high
    )
