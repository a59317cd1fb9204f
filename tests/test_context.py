"""A context that is divided over devices: parts of attention and their merge, and programs on meshes with that axis."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import lines
from models import tiny_config
from test_sharding import mesh_of

from jaxinfer.cache.quantized import quantize
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import abstract
from jaxinfer.ops.attention import Scaled, attention
from jaxinfer.ops.attention_parts import attention_part, join
from jaxinfer.ops.online_attention import online_attention
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.sharding.context import slots_on
from jaxinfer.sharding.fitting import check_fits
from jaxinfer.sharding.rules import RULES

BRANCHING = TokenTree.of([-1, 0, 0, 1, 3, 2])


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("form", ["float32", "int8", "float8_e4m3fn"])
@pytest.mark.parametrize(
    ("T", "starts", "window", "softcap", "tree"),
    [
        (1, [0, 15, 16, 63], None, None, None),
        (6, [0, 12, 30, 58], None, 3.0, None),
        (6, [0, 12, 30, 58], 9, None, None),
        (6, [0, 12, 30, 58], None, None, BRANCHING),
        (6, [0, 12, 14, 58], 4, None, BRANCHING),
        (40, [0, 3, 20, 24], 25, None, None),
    ],
    ids=["step", "softcap", "window", "tree", "window-tree", "prompt"],
)
def test_parts_of_the_slots_merge_to_attention_over_all(form, T, starts, window, softcap, tree):
    """Four parts of 16 slots each, NaN where no query looks; the last row has padding at its end, and no tree does."""
    B, K, G, H, S, parts = len(starts), 2, 2, 16, 64, 4
    q, k, v = draw(0, B, T, K * G, H), draw(1, B, K, S, H), draw(2, B, K, S, H)
    counts = np.array([T] * (B - 1) + [T if tree else max(T - 3, 1)])
    offset = np.arange(T)
    depth = offset if tree is None else tree.depth
    positions = np.where(offset < counts[:, None], np.asarray(starts)[:, None] + depth, -1)
    unused = np.arange(S) >= (np.asarray(starts) + counts)[:, None]
    options = dict(scale=0.3, window=window, softcap=softcap, tree=tree)
    positions = jnp.asarray(positions, jnp.int32)
    if form == "float32":
        k, v = (jnp.where(unused[:, None, :, None], jnp.nan, x) for x in (k, v))
        whole = attention(q, k, v, positions, **options)
    else:
        k, v = (quantize(x, form) for x in (k, v))
        k, v = (Scaled(x.values, jnp.where(unused[:, None], jnp.nan, x.scale)) for x in (k, v))
        whole = online_attention(q, k, v, positions, **options)
    size = S // parts

    def cut(x: jax.Array, i: int) -> jax.Array:
        return x[:, :, i * size : (i + 1) * size]

    attend = jax.jit(functools.partial(attention_part, **options))
    found = [
        attend(q, *(jax.tree.map(functools.partial(cut, i=i), x) for x in (k, v)), positions, jnp.int32(i * size))
        for i in range(parts)
    ]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(functools.reduce(join, found)[0][real], whole[real], rtol=0, atol=2e-5)
    before = real & (np.asarray(positions) < size) if tree is None else np.zeros_like(real)
    assert (np.asarray(found[1][1])[before] < -1e29).all()  # of no weight: these see nothing of the second part


@pytest.mark.parametrize(
    ("slots", "mesh", "each"), [(256, "context=4", 64), (256, "context=3", 86), (4096, "context=3", 1408)]
)
def test_slots_are_as_many_on_each_device(slots, mesh, each):
    sizes = dict(mesh_of(mesh).shape)
    assert slots_on(slots, sizes, RULES["mixed"]) == sizes["context"] * each >= slots
    assert slots_on(slots, {"model": 4}, RULES["mixed"]) == slots


@pytest.mark.parametrize(("mesh", "fits"), [("context=4,model=2", "data=4"), ("data=2,context=2,model=2", "data=4")])
def test_a_cache_whose_slots_are_not_divided_is_refused_with_a_mesh_that_fits(mesh, fits):
    model = apply(Program(abstract(tiny_config())), "kv_int4").model
    said = rf"mesh {mesh}: kv_int4, .*not divided by context=\d: take kv_int8 .*without context {fits},model=2 fits$"
    with pytest.raises(InputError, match=said):
        check_fits(model, mesh_of(mesh), RULES["mixed"])
    check_fits(model, mesh_of(f"{fits},model=2"), RULES["mixed"])
    windowed = apply(Program(abstract(tiny_config())), "kv_window").model
    with pytest.raises(InputError, match=r"kv_window, which holds .* without context"):
        check_fits(windowed, mesh_of(mesh), RULES["mixed"])
    for form in ("kv_paged", "kv_paged:store=int4"):
        paged = apply(Program(abstract(tiny_config())), form).model
        with pytest.raises(InputError, match=rf"kv_paged, whose pages .*=\d: take .*; without context {fits},model=2"):
            check_fits(paged, mesh_of(mesh), RULES["mixed"])


def test_programs_on_a_divided_context_give_what_one_device_gives():
    """A ragged batch over the devices' bounds, at once and in pieces; sessions that go on, go back, and speculate."""
    found = lines("mesh_context.py")
    texts = {(line["name"], line["pieces"]): line["largest"] for line in found if "pieces" in line}
    assert {how for name, how in texts if name == "none"} == {"prompt", "sevens", "steps", "halves"}
    assert max(texts.values()) < 1e-5, texts
    sessions = {line["decoder"]: line for line in found if "decoder" in line}
    assert set(sessions) == {"greedy", "ngram"} and all(line["same"] for line in sessions.values()), sessions
    (refused,) = (line["refused"] for line in found if "refused" in line)
    assert "TakenLayer is not divided by context" in refused
    assert all(n > 8 for line in sessions.values() for n in line["tokens"])  # no row says one thing only


def test_no_device_sees_another_ones_slots():
    """A step merges parts, a prompt's queries go round: what is moved is of new tokens, and no array of the cache."""
    rows, heads, key_heads, head, embed, layers, ways = 8, 4, 2, 16, 64, 2, 4  # heads: of a device
    step, prompt = (line for line in lines("mesh_context.py") if "moved" in line)
    parts = rows * heads * (head + 1) * 4
    assert sorted(map(tuple, step["moved"])) == sorted(
        [("all-reduce", rows * heads * 4, layers), ("all-reduce", parts, layers), ("all-reduce", rows * embed * 4, 5)]
    )
    a_token, t = rows * 4, prompt["tokens"] // ways
    assert sorted(map(tuple, prompt["moved"])) == sorted(
        [
            ("all-gather", a_token * prompt["tokens"] * key_heads * head, 2 * layers),  # new keys, and new values
            ("collective-permute", a_token * t * heads * head, (2 * ways - 1) * layers),  # queries and what they have
            ("collective-permute", a_token * t * heads, (ways - 1) * layers),  # and its log-sum-exp
            ("all-reduce", a_token * t * embed, 5),
        ]
    )
    assert max(size for _, size, _ in [*step["moved"], *prompt["moved"]]) < step["layer_bytes"] / 3
