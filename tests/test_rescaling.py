"""Factors that move from activations into weights leave the model the function that it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model, tiny_config, tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.passes import apply
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.passes.quantization.rescaling import FOLDS, folds
from jaxinfer.program import Program
from jaxinfer.tree import leaves, replace

TOKENS = jnp.arange(14).reshape(2, 7) * 5 % 96
CONFIGS = {
    "plain": {},
    "biased, untied": dict(qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False),
    "one kv head": dict(num_kv_heads=1, qk_norm=True, post_norms=True),
    "as many kv heads": dict(num_kv_heads=4),
    "experts": dict(moe=tiny_moe()),
}
LAYOUTS = {"separate": (), "fused": ("fused",), "fused, long": ("fused", "long_last")}


def logits(model):
    hidden, _ = model(TOKENS, model.init_cache(2, 8))
    return np.asarray(model.logits(hidden))


def factors_of(block, fold, key):
    """Return random factors of the channels that a fold rescales."""
    width = {"qkv": 32, "gate_up": 32, "down": 48, "o": block.attention.num_kv_heads * 8}[fold.name]
    shape = (4, 24) if fold.name == "down" and hasattr(block.mlp, "router") else (width,)
    return jnp.exp(jax.random.normal(key, shape))


@pytest.mark.parametrize("layouts", LAYOUTS)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", FOLDS)
def test_logits_stay(config, layouts, name):
    model = random_model(tiny_config(**CONFIGS[config]))
    model = replace(model, layers=[apply_layouts(block, LAYOUTS[layouts]) for block in model.layers])
    layers = []
    for i, block in enumerate(model.layers):
        (fold,) = folds(block, [name])
        new = fold.rescale(block, factors_of(block, fold, jax.random.key(i)))
        changed = [p for p, leaf in leaves(new).items() if leaf is not leaves(block)[p]]
        assert {f"{reader}.kernel" for reader in fold.readers} < set(changed)
        assert jax.tree.structure(new) == jax.tree.structure(block)
        layers.append(new)
    before, after = logits(model), logits(replace(model, layers=layers))
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_narrow_and_widen_share_a_factor_among_the_query_heads_of_a_kv_head():
    (fold,) = folds(random_model(tiny_config()).layers[0], ["o"])
    factors = jnp.arange(16.0)
    wide = fold.widen(factors).reshape(4, 8)
    np.testing.assert_array_equal(wide[0], wide[1])
    np.testing.assert_array_equal(wide[2], factors[8:])
    np.testing.assert_array_equal(fold.narrow(wide.reshape(-1)), factors)
    stat = jnp.concatenate([jnp.full((8,), h) for h in (1.0, 3.0, 5.0, 5.0)])
    np.testing.assert_array_equal(fold.narrow(stat, jnp.mean), [2.0] * 8 + [5.0] * 8)


def test_what_is_quantized_is_refused_and_unknown_places_are_named():
    program = apply(Program(random_model(tiny_config())), ("int8", {"where": r".*attention\.qkv.*"}))
    (fold,) = folds(program.model.layers[0], ["qkv"])
    with pytest.raises(InputError, match="quantized already"):
        fold.rescale(program.model.layers[0], jnp.ones(32))
    with pytest.raises(InputError, match="did you mean 'gate_up'"):
        folds(program.model.layers[0], ["gateup"])
