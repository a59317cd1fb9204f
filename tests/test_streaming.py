"""What the cache of sinks and newest tokens is: attention over what it holds, at positions in the cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config

from jaxinfer.cache.dense import DenseLayer
from jaxinfer.cache.streaming import Streaming
from jaxinfer.errors import InputError
from jaxinfer.eval.size import cache_cost
from jaxinfer.ops.rope import RopeConfig, rotate, turn
from jaxinfer.passes import apply

A, W, T, K, N, H = 2, 5, 61, 2, 4, 8
ROPES = {
    "default": RopeConfig(),
    "yarn": RopeConfig(kind="yarn", factor=4.0, original_context=16),
    "llama3": RopeConfig(kind="llama3", factor=8.0, original_context=16),
}


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.partial(jax.jit, static_argnames="rope")
def fed(cache, q, k, v, start, rope):
    positions = start[:, None] + jnp.arange(q.shape[1])
    cache = cache.append(rotate(k, positions, rope), v, start, jnp.full_like(start, q.shape[1]))
    return cache.attend(rotate(q, positions, rope), positions, scale=0.3, window=None, softcap=None)


@functools.partial(jax.jit, static_argnames="rope")
def reference(q, k, v, rope):
    """Know no ring: for every query make the text of its sinks and its window, and attend in it from its last token."""

    def attend(p):
        text = jnp.where(jnp.arange(A + W) < A, jnp.arange(A + W), p - W + jnp.arange(A + W) - A + 1)
        text = jnp.where(p < A + W, jnp.arange(A + W), text)
        last = jnp.minimum(p, A + W - 1)
        keys, values = (jnp.repeat(x[0, text], N // K, axis=1) for x in (k, v))
        keys = rotate(keys[None], jnp.arange(A + W)[None], rope)[0]
        query = rotate(q[:, p][:, None], last[None, None], rope)[0, 0]
        scores = 0.3 * jnp.einsum("nh,snh->ns", query, keys) - 1e9 * (jnp.arange(A + W) > last)
        return jnp.einsum("ns,snh->nh", jax.nn.softmax(scores), values)

    return jax.vmap(attend)(jnp.arange(T))


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("pieces", [(T,), (1,) * T, (40, 1, 20)], ids=["whole", "steps", "parts"])
def test_a_query_attends_to_what_is_held_as_if_nothing_had_been_between(rope, pieces):
    q, k, v = draw(0, 1, T, N, H), draw(1, 1, T, K, H), draw(2, 1, T, K, H)
    cache, found, at = Streaming(sinks=A, window=W, rope=rope).create(1, T, K, H, jnp.float32), [], 0
    for size in pieces:
        cut = slice(at, at + size)
        y, cache = fed(cache, q[:, cut], k[:, cut], v[:, cut], jnp.array([at]), rope)
        found.append(np.asarray(y[0]))
        at += size
    np.testing.assert_allclose(np.concatenate(found), reference(q, k, v, rope), rtol=0, atol=2e-5)


def test_what_it_holds_does_not_grow_with_the_context():
    program = random_program(tiny_config())
    cost = cache_cost(apply(program, "kv_window:sinks=4,window=100"))
    heads = program.config.num_kv_heads * program.config.head_dim
    assert not any(cost.per_token) and set(cost.fixed) == {2 * 4 * heads * (4 + 100 + 32)}
    assert isinstance(Streaming(sinks=4, window=64, rope=RopeConfig()).create(1, 64, K, H, jnp.float32), DenseLayer)


def test_to_turn_is_to_have_rotated_further():
    x, at = draw(3, 2, 6, N, H), jnp.arange(12).reshape(2, 6) * 3
    for rope in ROPES.values():
        further = rotate(x, at + 2, rope)
        np.testing.assert_allclose(turn(rotate(x, at, rope), jnp.full_like(at, 2), at, rope), further, atol=1e-5)


@pytest.mark.parametrize(("options", "said"), [("window=0", "window=0: .*1 token"), ("sinks=-1", "sinks=-1, .*0")])
def test_a_window_of_nothing_is_refused(options, said):
    with pytest.raises(InputError, match=said):
        apply(random_program(tiny_config()), f"kv_window:{options}")


def test_a_rotated_cache_turns_queries_in_their_own_basis():
    """quarot keeps the function; with a window after or before it the outputs stay those of the window alone."""
    ids = jnp.arange(60, dtype=jnp.int32)[None] * 11 % 96
    sizes = dict(embed_dim=64, mlp_dim=128, head_dim=16, windows=())

    def scores(*passes: str) -> np.ndarray:
        model = apply(random_program(tiny_config(**sizes)), *passes).model
        return np.asarray(model.logits(model(ids, model.init_cache(1, 64))[0]))

    alone, window = scores(), scores("kv_window:sinks=2,window=9")
    assert np.abs(window - alone).max() > 1e-2 * np.abs(alone).max()
    for passes in (("quarot", "kv_window:sinks=2,window=9"), ("kv_window:sinks=2,window=9", "quarot")):
        np.testing.assert_allclose(scores(*passes), window, rtol=0, atol=1e-4 * np.abs(window).max())
