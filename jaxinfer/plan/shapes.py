"""Models by name without their weights: published shapes, config.json files, and whatever `load` knows."""

import dataclasses
from pathlib import Path

from jaxinfer.checkpoint import orbax
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.hf_keys import read_json
from jaxinfer.checkpoint.registry import KNOWN, resolve
from jaxinfer.checkpoint.source import open_source
from jaxinfer.errors import InputError, nearest
from jaxinfer.models.config import ModelConfig, MoeConfig, config_from_dict
from jaxinfer.ops.rope import RopeConfig


def _llama(vocab: int, context: int, theta: float | int, kv_heads: int | None, sizes: tuple[int, int, int, int]):
    layers, embed, mlp, heads = sizes
    return ModelConfig(
        family="llama", vocab_size=vocab, embed_dim=embed, mlp_dim=mlp, num_layers=layers, num_heads=heads,
        num_kv_heads=kv_heads or heads, head_dim=128, max_context=context, norm_eps=1e-5, rope=RopeConfig(theta=theta),
        tie_embeddings=False,
    )  # fmt: skip


def _qwen3_moe(layers: int, embed: int, mlp: int, heads: int, expert: int) -> ModelConfig:
    return ModelConfig(
        family="qwen3_moe", vocab_size=151_936, embed_dim=embed, mlp_dim=mlp, num_layers=layers, num_heads=heads,
        num_kv_heads=4, head_dim=128, max_context=40_960, rope=RopeConfig(theta=1e6), qk_norm=True,
        tie_embeddings=False, moe=MoeConfig(num_experts=128, experts_per_token=8, expert_dim=expert),
    )  # fmt: skip


SHAPES: dict[str, ModelConfig] = {
    "llama2-7b": _llama(32_000, 4096, 1e4, None, (32, 4096, 11_008, 32)),
    "llama2-13b": _llama(32_000, 4096, 1e4, None, (40, 5120, 13_824, 40)),
    "llama2-70b": _llama(32_000, 4096, 1e4, 8, (80, 8192, 28_672, 64)),
    "llama3-8b": _llama(128_256, 8192, 5e5, 8, (32, 4096, 14_336, 32)),
    "llama3-70b": _llama(128_256, 8192, 5e5, 8, (80, 8192, 28_672, 64)),
    "llama3-405b": dataclasses.replace(
        _llama(128_256, 131_072, 5e5, 8, (126, 16_384, 53_248, 128)),
        rope=RopeConfig(kind="llama3", theta=5e5, factor=8.0, original_context=8192),
    ),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 6144, 32, 768),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 12_288, 64, 1536),
}


def find_shape(name: str) -> tuple[ModelConfig, tuple]:
    """Return the architecture of a model and the passes that it was saved with: of a name, a config.json or a model.

    Raises:
        InputError: no such name, file or model.
    """
    if name in SHAPES:
        return SHAPES[name], ()
    path = Path(name).expanduser()
    if path.is_dir() and (path / "config.json").is_file() and not orbax.is_saved(path):
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        return config_from_hf(read_json(path), path), ()
    if not path.exists() and name not in KNOWN and "/" not in name:
        raise InputError(
            f"model {name!r}: {nearest(name, [*SHAPES, *KNOWN])}; or give a config.json, a model's path or owner/name"
        )
    path = resolve(name)
    if orbax.is_saved(path):
        saved = orbax.read_metadata(path)
        return config_from_dict(saved["config"]), tuple((n, dict(o)) for n, o in saved.get("passes", ()))
    return open_source(path).config, ()
