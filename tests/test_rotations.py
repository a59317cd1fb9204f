"""Rotations: the rotated model is the same function, on every family; and they do what they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config, tiny_moe

import jaxinfer.passes as passes
from jaxinfer.errors import InputError
from jaxinfer.generation import generate
from jaxinfer.models.layers import Linear
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.passes.quantization.norm_folding import fold_norms
from jaxinfer.passes.quantization.quarot import QuaRot
from jaxinfer.passes.quantization.rotation_nodes import HadamardExperts, HadamardLinear, RotatedKeysLayer
from jaxinfer.tree import leaves, select

FAMILIES = {
    "tied": {},
    "untied, biases": dict(tie_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True),
    "qk norm, one kv head": dict(qk_norm=True, num_kv_heads=1),
    "post norms, softcaps": dict(post_norms=True, embed_scale=5.0, final_softcap=20.0, attention_softcap=30.0),
    "post norms, untied, biases": dict(post_norms=True, tie_embeddings=False, out_bias=True, mlp_bias=True),
    "experts": dict(moe=tiny_moe()),
    "heads wider than the stream": dict(head_dim=16, num_kv_heads=4),
}
LAYOUTS = (("fused",), ("long_last",), ("fused", "long_last"))
ALL = dict(residual=True, down=True, values=True, heads=True, keys=True)


@jax.jit
def _step(model, tokens, cache):
    x, cache = model(tokens, cache)
    return model.logits(x), cache


def logits_of(program):
    """Return the logits of a prompt, and of two more tokens one at a time."""
    tokens = jax.random.randint(jax.random.key(9), (2, 10), 0, 96)
    out, cache = _step(program.model, tokens[:, :8], program.model.init_cache(2, 32))
    for t in (8, 9):
        more, cache = _step(program.model, tokens[:, t : t + 1], cache)
        out = np.concatenate([out, more], axis=1)
    return out


def assert_same_function(a, b, tolerance=1e-4):
    expected, found = logits_of(a), logits_of(b)
    assert np.abs(expected).max() > 0.5
    assert np.abs(expected - found).max() <= tolerance * np.abs(expected).max()


def kernels(program):
    return {path: node.kernel for path, node in select(program.model, Linear).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_rotated_model_is_the_same_function(family):
    program = random_program(tiny_config(**FAMILIES[family]))
    assert_same_function(program, QuaRot(**ALL)(program))


@pytest.mark.parametrize("option", list(ALL))
def test_each_rotation_alone_is_the_same_function_and_changes_the_tree(option):
    program = random_program(tiny_config(tie_embeddings=False, qkv_bias=True, moe=tiny_moe()))
    rotated = QuaRot(**{**dict.fromkeys(ALL, False), option: True})(program)
    assert_same_function(program, rotated)
    assert jax.tree.structure(rotated.model) != jax.tree.structure(program.model) or any(
        np.abs(new - old).max() > 0.01
        for new, old in zip(kernels(rotated).values(), kernels(program).values(), strict=True)
    )


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
def test_every_layout(layouts):
    program = random_program(tiny_config(tie_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True))
    laid = program.replace(model=apply_layouts(program.model, layouts))
    assert_same_function(program, QuaRot(**ALL)(laid))


def test_all_off_is_the_baseline_itself():
    program = random_program(tiny_config())
    same = QuaRot(**QuaRot.about.degenerate)(program)
    assert all(a is b for a, b in zip(jax.tree.leaves(program.model), jax.tree.leaves(same.model), strict=True))


def test_twice_is_still_the_same_function():
    program = random_program(tiny_config(post_norms=True))
    assert_same_function(program, QuaRot(seed=1)(QuaRot()(program)))


def test_the_seed_is_another_rotation():
    program = random_program(tiny_config())
    a, b = (kernels(QuaRot(seed=s)(program))["layers.0.attention.qkv.q"] for s in (0, 1))
    assert np.abs(a - b).max() > 0.01


def test_a_tied_table_stays_tied_and_nothing_large_is_added():
    program = random_program(tiny_config())
    rotated = QuaRot()(program)
    assert rotated.model.unembed is None
    before, after = (sum(x.size for x in jax.tree.leaves(p.model)) for p in (program, rotated))
    assert after - before == program.config.embed_dim  # the signs


def test_folded_norms_have_gains_of_one_and_the_same_function():
    program = random_program(tiny_config(tie_embeddings=False, moe=tiny_moe()))
    folded = program.replace(model=fold_norms(program.model))
    assert_same_function(program, folded, 1e-5)
    gains = {path: leaf for path, leaf in leaves(folded.model).items() if path.endswith("norm.scale")}
    assert len(gains) == 5
    assert all((gain == 1).all() for gain in gains.values())
    tied = random_program(tiny_config())
    np.testing.assert_array_equal(fold_norms(tied.model).final_norm.scale, tied.model.final_norm.scale)


def test_shapes_are_enough():
    for family in FAMILIES.values():
        program = random_program(tiny_config(**family))
        abstract = program.replace(model=jax.eval_shape(lambda p=program: p.model))
        rotated = QuaRot(**ALL)(program).model
        expected = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), rotated)
        assert jax.tree.leaves(QuaRot(**ALL)(abstract).model) == jax.tree.leaves(expected)


def test_online_nodes_leave_the_linear_inside_to_other_passes():
    rotated = QuaRot(heads=True)(random_program(tiny_config(moe=tiny_moe())))
    assert sorted(select(rotated.model, HadamardLinear)) == [
        "layers.0.attention.o", "layers.0.mlp.down", "layers.1.attention.o",
    ]  # fmt: skip
    assert list(select(rotated.model, HadamardExperts)) == ["layers.1.mlp.down"]
    assert "layers.0.mlp.down.linear" in kernels(rotated)
    quantized = passes.apply(rotated, "int8")
    assert np.isfinite(logits_of(quantized)).all()


def test_keys_are_rotated_in_any_kind_of_cache_and_order():
    program = random_program(tiny_config())
    for program_of in (
        lambda: passes.apply(QuaRot(keys=True)(program), "kv_int8"),
        lambda: QuaRot(keys=True)(passes.apply(program, "kv_int8")),
    ):
        cache = program_of().model.init_cache(1, 64)
        assert all(isinstance(layer, RotatedKeysLayer) for layer in cache.layers)
        assert {leaf.dtype for leaf in jax.tree.leaves(cache.layers[0])} >= {jnp.dtype(jnp.int8)}
        assert_same_function(program, program_of(), 0.05)


def test_generated_tokens_are_the_same():
    program = random_program(tiny_config())
    plain, rotated = (generate(p, [[5, 6, 7]], max_new_tokens=12).tokens for p in (program, QuaRot(**ALL)(program)))
    np.testing.assert_array_equal(plain, rotated)


def test_a_size_without_a_matrix_is_refused_with_its_path_or_size():
    program = random_program(tiny_config(mlp_dim=46))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down: size 46:"):
        QuaRot()(program)
    assert_same_function(program, QuaRot(down=False)(program))


def test_quantized_kernels_are_refused():
    with pytest.raises(InputError, match="put it first"):
        passes.apply(random_program(tiny_config()), "int8", "quarot")
