"""Nodes of a tree see what a text of their path alone would see; the path that is kept is all that is remembered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config

from jaxinfer.errors import InputError
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.passes import apply
from jaxinfer.program import Program

PARENTS = (-1, 0, 0, 1, 1, 2, 5, 3)
CACHES = {
    "dense": (), "kv_int8": ("kv_int8",), "kv_fp8": ("kv_fp8",), "kv_int4": ("kv_int4:group=8,residual=16",),
    "rotated": ("quarot", "kv_int8"), "kv_paged": ("kv_paged:page=8",),
    "kv_window": ("kv_window:sinks=2,window=9",), "rotated_window": ("quarot", "kv_window:sinks=2,window=9"),
}  # fmt: skip
PROMPTS, LENGTHS = (np.arange(2 * 37).reshape(2, 37) * 7 % 96).astype(np.int32), np.array([37, 23], np.int32)
NODES = (np.arange(16).reshape(2, 8) * 5 % 96 + 1).astype(np.int32)


@functools.cache
def program(cache: str) -> Program:
    sizes = dict(embed_dim=64, mlp_dim=128, head_dim=16, windows=(6, None))
    return apply(random_program(tiny_config(**sizes)), *CACHES[cache])


@jax.jit
def forward(model, tokens, cache, counts, tree=None):
    hidden, cache = model(tokens, cache, counts, tree)
    return model.logits(hidden), cache


keep = jax.jit(lambda cache, start, nodes, counts: cache.keep(start, nodes, counts))


def path(node: int) -> list[int]:
    return [] if node < 0 else [*path(PARENTS[node]), node]


@functools.cache
def filled(cache: str):
    model = program(cache).model
    return forward(model, PROMPTS, model.init_cache(2, 128), LENGTHS)[1]


def check(found, expected, cache: str):
    """Codes of a quantized cache round what differs in a float's last bit to another step, now and then."""
    far = np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    assert far <= (1e-5 if cache == "dense" else 1e-2), far


@pytest.mark.parametrize("cache", CACHES)
def test_a_node_sees_what_its_path_alone_would_see(cache):
    model = program(cache).model
    scores, _ = forward(model, NODES, filled(cache), np.array([8, 8], np.int32), TokenTree.of(PARENTS))
    for node in (1, 4, 6, 7):
        alone, _ = forward(model, NODES[:, path(node)], filled(cache), np.full(2, len(path(node)), np.int32))
        check(scores[:, node], alone[:, -1], cache)


@pytest.mark.parametrize("cache", CACHES)
def test_a_path_that_is_kept_is_all_that_is_remembered(cache):
    """Rows keep paths of their own, one of them of a tree that is cut short; what follows then is the same."""
    model = program(cache).model
    _, tree = forward(model, NODES, filled(cache), np.array([8, 6], np.int32), TokenTree.of(PARENTS))
    kept = [path(7), path(5)]
    nodes = np.array([[*row, 0, 0][:4] for row in kept], np.int32)
    counts = np.array([len(row) for row in kept], np.int32)
    tree = keep(tree, LENGTHS, nodes, counts)
    _, plain = forward(model, np.take_along_axis(NODES, nodes, axis=1), filled(cache), counts)
    assert tree.length.tolist() == plain.length.tolist() == (LENGTHS + counts).tolist()
    after = (np.arange(60).reshape(2, 30) * 3 % 96).astype(np.int32)
    for width in (1, 29):  # one token, and more of them: packed groups are completed on the way
        expected, plain = forward(model, after[:, :width], plain, np.full(2, width, np.int32))
        found, tree = forward(model, after[:, :width], tree, np.full(2, width, np.int32))
        check(found, expected, cache)


def test_rows_may_have_trees_of_their_own():
    model = program("dense").model
    other = (-1, 0, 1, 2, 2, 0, 5, 5)
    trees = TokenTree(*(np.stack(x) for x in zip(TokenTree.of(PARENTS), TokenTree.of(other), strict=True)))
    counts = np.array([8, 8], np.int32)
    found, _ = forward(model, NODES, filled("dense"), counts, jax.tree.map(jnp.asarray, trees))
    for row, parents in enumerate((PARENTS, other)):
        expected, _ = forward(model, NODES, filled("dense"), counts, TokenTree.of(parents))
        check(found[row], expected[row], "dense")


def test_what_is_refused():
    with pytest.raises(InputError, match=r"parents=\(-1, 0, 2\): must be -1 and then"):
        TokenTree.of((-1, 0, 2))
    wide = (-1, *[0] * 20)
    nodes = np.ones((2, 21), np.int32)
    with pytest.raises(InputError, match="a tree of 21 nodes: this cache of residual=16 takes at most 16"):
        forward(program("kv_int4").model, nodes, filled("kv_int4"), np.array([21, 21]), TokenTree.of(wide))
    with pytest.raises(InputError, match="a tree of 300 nodes: must have at most 256"):
        nodes = np.ones((2, 300), np.int32)
        forward(program("dense").model, nodes, filled("dense"), np.array([300, 300]), TokenTree.of((-1, *[0] * 299)))
