"""Surgery on trees: nothing is assigned in the input, what is left alone is shared, and a miss is loud."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_model, tiny_config, tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear, RMSNorm
from jaxinfer.models.transformer import MLP, QKV, Attention, Block, abstract
from jaxinfer.passes.layout import LAYOUTS
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV, fuse
from jaxinfer.tree import leaves, replace, rewrite, select

CONFIGS = {
    "plain": {},
    "biased": dict(qkv_bias=True, out_bias=True, mlp_bias=True, tie_embeddings=False),
    "one kv head": dict(num_kv_heads=1, qk_norm=True, post_norms=True),
    "as many kv heads": dict(num_kv_heads=4),
    "experts": dict(moe=tiny_moe()),
}


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config())


def snapshot(tree):
    return {path: (id(leaf), np.asarray(leaf).copy()) for path, leaf in leaves(tree).items()}


def assert_untouched(tree, before):
    after = leaves(tree)
    assert list(after) == list(before)
    for path, (identity, value) in before.items():
        assert id(after[path]) == identity
        np.testing.assert_array_equal(after[path], value)


def twice(linear: Linear) -> Linear:
    return replace(linear, kernel=linear.kernel * 2)


def test_paths_name_every_leaf(model):
    paths = leaves(model)
    assert paths["layers.1.attention.qkv.q.kernel"] is model.layers[1].attention.qkv.q.kernel
    assert paths["embed.table"].shape == (96, 32)
    assert len(paths) == len(jax.tree.leaves(model))


def test_select_goes_by_kind_and_full_path(model):
    assert len(select(model, Linear)) == 2 * 7
    assert list(select(model, Linear, r"layers\.1\.mlp\..*")) == [
        "layers.1.mlp.gate_up.gate",
        "layers.1.mlp.gate_up.up",
        "layers.1.mlp.down",
    ]
    assert select(model, Linear, "mlp") == {}  # the whole path, not a part of it
    assert select(model, Block, r"layers\.0") == {"layers.0": model.layers[0]}
    assert list(select(model, type(model))) == [""]  # the root has the empty path
    assert len(select(model.layers, RMSNorm)) == 4  # a list is a tree too


def test_rewrite_is_pure_and_shares(model):
    before = snapshot(model)
    where = r"layers\.1\..*\.(q|down)"
    new = rewrite(model, Linear, where, twice)
    assert_untouched(model, before)
    changed = {path for path, leaf in leaves(new).items() if leaf is not leaves(model)[path]}
    assert changed == {"layers.1.attention.qkv.q.kernel", "layers.1.mlp.down.kernel"}
    for path in changed:
        np.testing.assert_array_equal(leaves(new)[path], 2 * leaves(model)[path])
    assert new.layers[0] is model.layers[0] and new.layers is not model.layers
    assert jax.tree.structure(new) == jax.tree.structure(model)


def test_rewrite_does_not_enter_what_it_replaced(model):
    seen = []

    def note(node):
        seen.append(node)
        return node

    assert rewrite(model, nnx.Module, r"layers\.0|layers\.0\..*", note) is model
    assert seen == [model.layers[0]]


def test_rewrite_can_change_the_kind_of_a_node(model):
    new = rewrite(model, MLP, ".*", lambda node: node.down)
    assert all(isinstance(block.mlp, Linear) for block in new.layers)
    assert all(isinstance(block.mlp, MLP) for block in model.layers)


@pytest.mark.parametrize("of", [random_model, abstract])
def test_a_miss_raises_and_lists_the_paths(of):
    model = of(tiny_config())
    with pytest.raises(InputError, match=r"where='q': matches no Attention; there are 2: layers\.0\.attention, "):
        rewrite(model, Attention, "q", lambda node: node)
    with pytest.raises(InputError, match="the tree has none"):
        rewrite(model, FusedQKV, ".*", lambda node: node)


def test_replace_shares_the_other_fields(model):
    block = model.layers[0]
    before = snapshot(block)
    norm = RMSNorm(jnp.ones(32), eps=0.5)
    new = replace(block, mlp_norm=norm)
    assert_untouched(block, before)
    assert type(new) is Block and new.mlp_norm is norm and new.attention is block.attention
    assert new.attention_post_norm is None
    static = replace(block.attention, window=3)
    assert (static.window, block.attention.window) == (3, 24) and static.qkv.q.kernel is block.attention.qkv.q.kernel
    with pytest.raises(ValueError, match="Block has no field 'norm'; it has attention_norm, "):
        replace(block, norm=norm)


def test_surgery_works_on_abstract_trees_and_under_jit():
    shapes = abstract(tiny_config())

    def halve(linear):
        kernel = jax.ShapeDtypeStruct(linear.kernel.shape, jnp.bfloat16)
        return replace(linear, kernel=kernel)

    new = rewrite(shapes, Linear, ".*mlp.*", halve)
    assert new.layers[0].mlp.down.kernel.dtype == jnp.bfloat16
    assert shapes.layers[0].mlp.down.kernel.dtype == jnp.float32
    traced = jax.eval_shape(lambda m: rewrite(m, Linear, ".*mlp.*", twice), shapes)
    assert jax.tree.structure(traced) == jax.tree.structure(shapes)


def forward(model, tokens):
    hidden, _ = model(tokens, model.init_cache(*tokens.shape))
    return model.logits(hidden)


def dots(model) -> int:
    """Return how many matrix products the model's forward pass has."""
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    return jax.jit(forward).lower(model, tokens).as_text().count("stablehlo.dot_general")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layout_gives_the_same_numbers(name, layout):
    config = tiny_config(**CONFIGS[name])
    model = random_model(config)
    before = snapshot(model)
    changed = LAYOUTS[layout](model)
    assert_untouched(model, before)
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    np.testing.assert_allclose(forward(changed, tokens), forward(model, tokens), rtol=0, atol=5e-5)
    shapes = LAYOUTS[layout](abstract(config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), changed)
    traced = jax.eval_shape(LAYOUTS[layout], abstract(config))
    assert jax.tree.map(lambda x: x.shape, traced) == jax.tree.map(lambda x: x.shape, changed)
    for path, linear in select(changed, Linear).items():  # what a node says about its kernel stays true
        assert len(linear.axes) == linear.kernel.ndim, path


def test_layouts_combine_in_any_order():
    model = random_model(tiny_config(qkv_bias=True, mlp_bias=True))
    tokens = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    expected = forward(model, tokens)
    for first, second in (("fused", "long_last"), ("long_last", "fused")):
        both = LAYOUTS[second](LAYOUTS[first](model))
        np.testing.assert_allclose(forward(both, tokens), expected, rtol=0, atol=5e-5)


def test_the_fused_layout_has_fewer_products():
    shapes = abstract(tiny_config(windows=(7, None)))
    fused = fuse(shapes)
    assert len(select(fused, FusedQKV)) == len(select(fused, FusedGateUp)) == 2 and not select(fused, QKV)
    assert len(select(shapes, Linear)) - len(select(fused, Linear)) == 2 * 3
    assert dots(shapes) - dots(fused) == 2 * 3
