"""No dead fields: every field of a configuration changes the model's output, its shape, or what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model, tiny_config, tiny_moe

from jaxinfer.checkpoint.names import hf_names
from jaxinfer.errors import InputError
from jaxinfer.generation import generate
from jaxinfer.models.config import ModelConfig, MoeConfig, config_from_dict, config_to_dict
from jaxinfer.ops.rope import RopeConfig
from jaxinfer.program import Program
from jaxinfer.tree import leaves

LLAMA3 = RopeConfig(kind="llama3", factor=8.0, original_context=64, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = RopeConfig(kind="yarn", theta=50.0, factor=4.0, original_context=64, beta_fast=2.0, beta_slow=0.5)
LOCAL = RopeConfig(theta=100.0)
BASE = tiny_config(moe=tiny_moe(), windows=(6, None), max_context=300)

# Field by field: the configuration around it and the value that must make a difference.
MODEL_FIELDS = {
    "vocab_size": (BASE, 100),
    "embed_dim": (BASE, 40),
    "mlp_dim": (BASE, 40),
    "num_layers": (dataclasses.replace(BASE, windows=()), 3),
    "num_heads": (BASE, 8),
    "num_kv_heads": (BASE, 1),
    "head_dim": (BASE, 12),
    "norm_eps": (BASE, 0.3),
    "activation": (BASE, "gelu_tanh"),
    "rope": (BASE, LOCAL),
    "rope_local": (BASE, LOCAL),
    "windows": (BASE, (5, None)),
    "qkv_bias": (BASE, True),
    "out_bias": (BASE, True),
    "mlp_bias": (BASE, True),
    "qk_norm": (BASE, True),
    "post_norms": (BASE, True),
    "embed_scale": (BASE, 3.0),
    "attention_scale": (BASE, 0.5),
    "attention_softcap": (BASE, 1.0),
    "final_softcap": (BASE, 2.0),
    "tie_embeddings": (BASE, False),
    "moe": (BASE, None),
}
OTHERWISE = {"family", "max_context"}  # tests of their own below
ROPE_FIELDS = {
    "theta": (RopeConfig(), 500.0),
    "kind": (RopeConfig(factor=2.0), "linear"),
    "factor": (RopeConfig(kind="linear", factor=2.0), 3.0),
    "original_context": (LLAMA3, 32),
    "low_freq_factor": (LLAMA3, 2.0),
    "high_freq_factor": (LLAMA3, 3.0),
    "beta_fast": (YARN, 4.0),
    "beta_slow": (YARN, 0.2),
    "attention_factor": (YARN, 0.8),
    "truncate": (YARN, False),
}
MOE_FIELDS = {
    "num_experts": (tiny_moe(), 3),
    "experts_per_token": (tiny_moe(), 1),
    "expert_dim": (tiny_moe(), 16),
    "normalize_weights": (tiny_moe(), False),
    "layers": (tiny_moe(), (0,)),
}


@functools.cache
def outcome(config: ModelConfig):
    """Return the shapes of the leaves and the logits of one model with these sizes."""
    model = random_model(config)
    shapes = [leaf.shape for leaf in jax.tree.leaves(model)]
    tokens = jnp.arange(40, dtype=jnp.int32).reshape(2, 20) * 2
    hidden, _ = model(tokens, model.init_cache(2, 20))
    return shapes, np.asarray(model.logits(hidden))


def assert_matters(before: ModelConfig, after: ModelConfig) -> None:
    (shapes, logits), (new_shapes, new_logits) = outcome(before), outcome(after)
    assert np.isfinite(new_logits).all()
    assert shapes != new_shapes or np.abs(logits - new_logits).max() > 1e-3


@pytest.mark.parametrize(
    ("kind", "table", "otherwise"),
    [(ModelConfig, MODEL_FIELDS, OTHERWISE), (RopeConfig, ROPE_FIELDS, set()), (MoeConfig, MOE_FIELDS, set())],
)
def test_every_field_is_in_the_table(kind, table, otherwise):
    assert {field.name for field in dataclasses.fields(kind)} == set(table) | otherwise


@pytest.mark.parametrize("field", MODEL_FIELDS)
def test_a_model_field_matters(field):
    config, value = MODEL_FIELDS[field]
    assert_matters(config, dataclasses.replace(config, **{field: value}))


@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_a_rope_field_matters(field):
    rope, value = ROPE_FIELDS[field]
    changed = dataclasses.replace(rope, **{field: value})
    assert_matters(dataclasses.replace(BASE, rope=rope), dataclasses.replace(BASE, rope=changed))


@pytest.mark.parametrize("change", [{"factor": 5.0}, {"original_context": 5}], ids=str)
def test_a_field_of_dynamic_ntk_matters(change):
    rope = RopeConfig(kind="ntk", factor=2.0, original_context=10)
    changed = dataclasses.replace(rope, **change)
    assert_matters(dataclasses.replace(BASE, rope=rope), dataclasses.replace(BASE, rope=changed))


@pytest.mark.parametrize("field", MOE_FIELDS)
def test_a_field_of_the_experts_matters(field):
    moe, value = MOE_FIELDS[field]
    changed = dataclasses.replace(moe, **{field: value})
    assert_matters(dataclasses.replace(BASE, moe=moe), dataclasses.replace(BASE, moe=changed))


def test_max_context_is_refused_when_passed():
    short = Program(random_model(dataclasses.replace(BASE, max_context=16)))
    long = short.replace(model=random_model(BASE))
    prompt = [list(range(3, 19))]
    assert generate(long, prompt, max_new_tokens=2).lengths.tolist() == [2]
    with pytest.raises(InputError, match="context is 16"):
        generate(short, prompt, max_new_tokens=2)


def test_family_names_the_checkpoint_layout():
    """It selects the names of stored tensors, and nothing in the model."""
    tables = {family: repr(hf_names(tiny_config(family=family))) for family in ("llama", "gemma2")}
    assert tables["llama"] != tables["gemma2"]


def test_no_leaf_is_dead():
    """Every number of a model with every part moves the logits."""
    every = dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, post_norms=True, tie_embeddings=False)
    model = random_model(dataclasses.replace(BASE, **every))
    tokens = jnp.arange(96, dtype=jnp.int32).reshape(4, 24)  # the whole vocabulary

    def loss(model):
        hidden, _ = model(tokens, model.init_cache(4, 24))
        return (jnp.cos(jnp.arange(96)) * model.logits(hidden)).sum()

    for path, gradient in leaves(jax.jit(jax.grad(loss))(model)).items():
        share = float((gradient != 0).mean())
        assert share > 0.99, f"{path}: {share:.0%} of it matters"


@pytest.mark.parametrize("rope", [RopeConfig(), LLAMA3, YARN], ids=lambda r: r.kind)
def test_a_config_survives_json(rope):
    for config in (BASE, tiny_config(windows=()), tiny_config(moe=tiny_moe(layers=None))):
        config = dataclasses.replace(config, rope=rope, rope_local=LOCAL)
        assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
