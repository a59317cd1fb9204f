"""Small models for the tests: random ones by configuration, and checkpoints read from a directory."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxinfer.checkpoint import names
from jaxinfer.checkpoint.assemble import assemble
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.safetensors_files import entries
from jaxinfer.models.config import ModelConfig, MoeConfig
from jaxinfer.models.transformer import Transformer, abstract, random
from jaxinfer.program import Program
from jaxinfer.text.tokenizer import from_huggingface

GOLDENS = Path(__file__).resolve().parent / "goldens"


def tiny_config(**changes) -> ModelConfig:
    """Return a configuration of two layers, the first one with a window, changed as asked."""
    base = dict(
        family="llama",
        vocab_size=96,
        embed_dim=32,
        mlp_dim=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_context=512,
        windows=(24, None),
    )
    return ModelConfig(**{**base, **changes})


def tiny_moe(**changes) -> MoeConfig:
    """Return a mixture of four experts, two a token, in the second layer."""
    return MoeConfig(**{**dict(num_experts=4, experts_per_token=2, expert_dim=24, layers=(1,)), **changes})


def random_model(config: ModelConfig, seed: int = 0, spread: float = 2.0) -> Transformer:
    """Return a random model whose matrices are drawn wide and whose vectors are off their defaults, so that all count.

    Logits differ by units: two tokens are never close to a tie.
    """
    model = random(config, seed)
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        treedef,
        [
            leaf * spread if leaf.ndim > 1 else leaf + 0.3 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(leaves, keys, strict=True)
        ],
    )


def random_program(config: ModelConfig, seed: int = 0, **fields) -> Program:
    """Return a program around `random_model`."""
    return Program(random_model(config, seed), **fields)


def load_model(directory: Path, dtype=jnp.float32) -> Transformer:
    """Read a Hugging Face directory's model."""
    config = config_from_hf(json.loads((directory / "config.json").read_text()), directory / "config.json")
    return assemble(abstract(config, dtype), config, entries(directory), names.hf_names(config), path=directory)


def load_directory(directory: Path) -> Program:
    """Read a Hugging Face directory's model and tokenizer."""
    tokenizer = from_huggingface(directory)
    stop = (tokenizer.eos_id,) if tokenizer.eos_id is not None else ()
    return Program(load_model(directory), tokenizer=tokenizer, stop_ids=stop, name=directory.name)
