"""A mixture of depths: the dense model at its neutral setting, ahead of itself in training, and never in sampling."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.models.mixture_of_depths import MixtureOfDepths
from jaxinfer.passes.depth.mixture_of_depths import predictor_loss, routed, with_mixture_of_depths
from jaxinfer.tree import replace, rewrite

T, SLOTS = 24, 32
IDS = (jnp.arange(T, dtype=jnp.int32) * 11 % 96)[None]


@functools.cache
def dense():
    return random_program(tiny_config(windows=()))


@functools.cache
def trained(capacity: float = 0.5):
    """Return the model with routers and predictors off their neutral values: some tokens are taken, some are not."""

    def draw(node: MixtureOfDepths) -> MixtureOfDepths:
        kernels = 0.3 * jax.random.normal(jax.random.key(3), (2, *node.router.kernel.shape))
        changed = (replace(n, kernel=k) for n, k in zip((node.router, node.predictor), kernels, strict=True))
        return MixtureOfDepths(node.block, *changed, capacity=node.capacity, routing=node.routing)

    return rewrite(with_mixture_of_depths(dense().model, capacity), MixtureOfDepths, ".*", draw)


@jax.jit
def _run(model, ids, cache, counts):
    x, cache = model(ids, cache, counts)
    return model.logits(x), cache


def run(model, ids, cache=None, counts=None):
    cache = model.init_cache(len(ids), SLOTS) if cache is None else cache
    return _run(model, ids, cache, jnp.full(len(ids), ids.shape[1], jnp.int32) if counts is None else counts)


@pytest.mark.parametrize(("capacity", "routing"), [(1.0, "top_k"), (0.25, "causal")])
def test_with_a_gate_of_one_and_room_for_all_it_is_the_dense_model(capacity, routing):
    mixed = routed(with_mixture_of_depths(dense().model, capacity, every=1), routing)
    np.testing.assert_allclose(run(mixed, IDS)[0], run(dense().model, IDS)[0], atol=2e-4)


def test_top_k_takes_as_many_tokens_as_it_has_room_for_and_computes_less():
    costs = {}
    for capacity in (0.25, 0.5, 1.0):
        model = trained(capacity)
        layer, x = model.layers[1], model.embed(IDS)
        takes = layer.takes(x, jnp.arange(T)[None])
        scores = np.asarray(layer.router(x)[0, :, 0])
        assert takes.sum() == math.ceil(capacity * T)
        assert capacity == 1 or scores[np.asarray(takes[0])].min() >= scores[~np.asarray(takes[0])].max()
        cost = jax.jit(lambda layer, *args: layer(*args)).lower(
            layer, x, jnp.arange(T)[None], layer.init_cache(1, SLOTS, x.dtype), jnp.zeros(1, jnp.int32), jnp.full(1, T)
        )
        costs[capacity] = cost.cost_analysis()["flops"]
    assert costs[0.25] < 0.5 * costs[1.0] and costs[0.5] < 0.7 * costs[1.0]


def test_training_looks_ahead_and_sampling_never_does():
    changed = IDS.at[0, -4:].set((IDS[0, -4:] + 7) % 96)
    ahead = routed(trained(), "top_k")
    before = run(ahead, IDS)[0][0, :-4], run(ahead, changed)[0][0, :-4]
    assert np.abs(before[0] - before[1]).max() > 1e-2
    model = routed(trained(), "causal")
    takes = model.layers[1].takes(model.embed(IDS), jnp.arange(T)[None])
    assert 0 < takes.sum() < T
    for at in (1, 9, T - 1):  # whatever follows a token, its logits stay
        other = IDS.at[0, at:].set((IDS[0, at:] * 3 + 5) % 96)
        np.testing.assert_allclose(run(model, IDS)[0][0, :at], run(model, other)[0][0, :at], atol=1e-4)


def test_sampling_is_the_same_in_any_parts_rows_and_after_a_rewind():
    model = routed(trained(), "causal")
    rows = jnp.concatenate([IDS, (IDS * 5 + 1) % 96])
    whole, cache = run(model, rows)
    taken = np.asarray(cache.layers[1].taken[:, :T])
    assert (taken.sum(axis=1) > 0).all() and (taken.sum(axis=1) < T).all() and (taken[0] != taken[1]).any()
    cache = run(model, rows, counts=jnp.array([9, 17], jnp.int32))[1].rewind(jnp.array([5, 11], jnp.int32))
    for t in range(T - 11):  # rows at places of their own, token by token
        at = jnp.array([[5 + t], [11 + t]])
        logits, cache = run(model, jnp.take_along_axis(rows, at, axis=1), cache)
        np.testing.assert_allclose(logits[:, 0], whole[jnp.arange(2), at[:, 0]], atol=2e-4)
    answer = ji.generate(dense().replace(model=model), IDS[:, : T - 8], max_new_tokens=8).tokens
    logits = run(model, jnp.concatenate([IDS[:, : T - 8], answer], axis=1))[0]
    np.testing.assert_array_equal(jnp.argmax(logits[0, T - 9 : -1], axis=1), answer[0])


def test_the_gradient_reaches_the_router_and_the_predictor_learns_its_choice():
    model = trained()

    def loss(model):
        x, _ = model(IDS, model.init_cache(1, SLOTS))
        logp = jax.nn.log_softmax(model.logits(x)[:, :-1])
        return -jnp.take_along_axis(logp, IDS[:, 1:, None], axis=2).mean()

    layer = jax.jit(jax.grad(loss))(model).layers[1]
    assert np.abs(layer.router.kernel).max() > 1e-6 and np.abs(layer.router.bias).max() > 1e-6
    assert not np.abs(layer.predictor.kernel).any()
    ids = jax.random.randint(jax.random.key(0), (8, T), 0, 96)
    layer = jax.jit(jax.grad(lambda m: predictor_loss(m, ids)[0]))(model).layers[1]
    assert not np.abs(layer.router.kernel).any() and np.abs(layer.predictor.kernel).max() > 1e-6
    # The predictor alone, trained on what enters its layer, finds out what the router takes.
    x, _, _ = model.run_layers(model.embed(ids), model.init_cache(8, SLOTS), jnp.full(8, T), end=1)
    layer = model.layers[1]

    @jax.jit
    def train(predictor):
        def step(predictor, _):
            def of(p):
                own = MixtureOfDepths(layer.block, layer.router, p, capacity=0.5, routing="top_k")
                return own.predictor_loss(x)

            (_, hits), slope = jax.value_and_grad(of, has_aux=True)(predictor)
            return jax.tree.map(lambda w, g: w - 0.3 * g, predictor, slope), hits

        return jax.lax.scan(step, predictor, length=200)

    hits = train(layer.predictor)[1]
    assert hits[0] < 0.8 and hits[-1] > 0.9


def test_what_it_can_not_do_is_refused():
    for options, message in (({"capacity": 0.0}, "must be above 0"), ({"every": 5}, r"must be in 1\.\.2")):
        with pytest.raises(InputError, match=message):
            with_mixture_of_depths(dense().model, **options)
    with pytest.raises(InputError, match="draft chains"):
        one = jnp.ones(1, jnp.int32)
        trained().layers[1].init_cache(1, SLOTS, jnp.float32).keep(one, one[None], one)
