"""Attention in machine code on a CPU against XLA's: the same numbers, from what a query may see and nothing else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_cpu_kernels import _missing, isa  # noqa: F401 - a fixture

from jaxinfer.cache.dense import Dense
from jaxinfer.ops import cpu_attention, cpu_kernels
from jaxinfer.ops.attention import attention

pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")
B, K, S = 3, 2, 300


def case(T, G, H, window, seed=0):
    """Return q, k, v and positions: row 1 ends early, row 2 is padding alone; unused slots hold NaN."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((B, T, K * G, H), (B, K, S, H), (B, K, S, H)))
    start = np.array([S - T, 70, 0])
    positions = (start[:, None] + np.arange(T)).astype(np.int32)
    positions[1, T // 2 + 1 :], positions[2] = -1, -1
    for b, row in enumerate(positions):
        for store in (k, v):
            store[b, :, row.max() + 1 :] = np.nan
            if window is not None and row.max() >= 0:
                store[b, :, : max(row[0] - window + 1, 0)] = np.nan
    return (*map(jnp.asarray, (q, k, v, positions)), {"scale": H**-0.5, "window": window})


def softmax(q, k, v, positions, scale, window):
    """Return attention in double precision, query by query."""
    out = np.zeros(q.shape)
    G = q.shape[2] // k.shape[1]
    for b, t, n in np.ndindex(*q.shape[:3]):
        p = int(positions[b, t])
        seen = slice(0 if window is None else max(p - window + 1, 0), p + 1)
        keys, values = (np.asarray(x[b, n // G, seen], np.float64) for x in (k, v))
        if p >= 0:
            scores = keys @ np.asarray(q[b, t, n], np.float64) * scale
            weights = np.exp(scores - scores.max())
            out[b, t, n] = weights @ values / weights.sum()
    return out


@pytest.fixture
def calls(monkeypatch):
    """Return a list that counts the calls of the kernel as they are traced."""
    found, kernel = [], cpu_kernels.attention
    monkeypatch.setattr(cpu_kernels, "attention", lambda *a: found.append(a) or kernel(*a))
    return found


@pytest.mark.parametrize("window", [None, 1, 5, 150])
@pytest.mark.parametrize(("T", "G", "H"), [(1, 1, 64), (1, 3, 16), (2, 4, 128), (5, 3, 80), (8, 2, 64), (16, 1, 256)])
def test_it_is_attention_of_what_is_seen(isa, calls, T, G, H, window):  # noqa: F811
    *operands, options = case(T, G, H, window)
    found = np.asarray(attention(*operands, **options))
    expected = softmax(*operands, **options)
    real = np.asarray(operands[3]) >= 0
    assert calls and np.isfinite(found).all()
    np.testing.assert_allclose(found[real], expected[real], atol=3e-6)


@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 3), (4, 2), (5, 3)])
def test_however_many_heads_share_the_threads(calls, batch, heads):
    rng = np.random.default_rng(batch)
    q, k, v = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((batch, 2, 2 * heads, 32), (batch, heads, 500, 32), (batch, heads, 500, 32))
    )
    for last in (1, 9, 64, 499):
        positions = jnp.full((batch, 1), last) + jnp.array([-1, 0])
        np.testing.assert_allclose(
            attention(q, k, v, positions, scale=0.2), softmax(q, k, v, positions, 0.2, None), atol=3e-6
        )
    assert {min(8, call[-1] * call[2].shape[0] * call[2].shape[1]) for call in calls} == {8}  # pieces of work


def test_scores_of_any_size_give_what_softmax_gives():
    q, k, v, positions, options = case(1, 1, 16, None)
    for factor in (0.0, 1e-6, 30.0, 1e4):
        expected = softmax(q * factor, k, v, positions, **options)
        np.testing.assert_allclose(attention(q * factor, k, v, positions, **options), expected, atol=1e-5)


def test_a_nan_that_is_seen_is_not_hidden():
    q, k, v, positions, options = case(3, 2, 64, None)
    for broken in (dict(k=k.at[0, 1, 7, 3].set(jnp.nan), v=v), dict(k=k, v=v.at[0, 1, 7].set(jnp.nan))):
        found = np.asarray(attention(q, broken["k"], broken["v"], positions, **options))
        assert np.isnan(found[0, :, 2:]).all() and np.isfinite(found[0, :, :2]).all() and np.isfinite(found[1]).all()


def test_gradients_and_batches_of_calls_are_those_of_xla(calls):
    q, k, v, positions, options = case(4, 2, 32, 50)
    k, v = jnp.nan_to_num(k), jnp.nan_to_num(v)

    def loss(q, k, v, implementation=None):
        out = attention(q, k, v, positions, implementation=implementation, **options)
        return jnp.where((positions >= 0)[..., None, None], out, 0).sum()

    for own, xla in zip(*(jax.grad(loss, (0, 1, 2))(q, k, v, name) for name in (None, "xla")), strict=True):
        np.testing.assert_allclose(own, xla, atol=1e-5)
        assert np.abs(xla).max() > 0.1
    many = jax.vmap(lambda q: attention(q, k, v, positions, **options))(jnp.stack([q, 2 * q]))
    assert calls
    np.testing.assert_allclose(many[1], attention(2 * q, k, v, positions, **options), atol=1e-6)


@pytest.mark.parametrize("change", ["queries", "dtype", "head", "softcap", "implementation"])
def test_what_it_is_not_made_for_is_left_to_xla(calls, change):
    T, H = 17 if change == "queries" else 2, 24 if change == "head" else 32
    q, k, v, positions, options = case(T, 2, H, None)
    if change == "dtype":
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    more = {"softcap": {"softcap": 30.0}, "implementation": {"implementation": "xla"}}.get(change, {})
    assert np.isfinite(np.asarray(attention(q, k, v, positions, **options, **more), np.float32)).all()
    assert not calls and cpu_attention.MOST_QUERIES == 16


@pytest.mark.parametrize("T", [1, 4])
def test_a_loop_copies_no_cache(T):
    """XLA writes a cache twice that is handed on in another shape."""

    @jax.jit
    def run(layer, x, start):
        def step(i, carry):
            layer, x = carry
            now = start + i * T
            layer = layer.append(x[:, :, :K], x[:, :, :K], now, jnp.full(1, T))
            out, layer = layer.attend(x, now[:, None] + jnp.arange(T), scale=0.1, window=None, softcap=None)
            return layer, out

        return jax.lax.fori_loop(0, 9, step, (layer, x))

    layer = Dense().create(1, 512, K, 32, jnp.float32)
    text = run.lower(layer, jnp.ones((1, T, 2 * K, 32)), jnp.zeros(1, jnp.int32)).compile().as_text()
    body = next(part for part in re.split(r"\n\n", text) if "custom-call" in part and "attention" in part)
    written = re.findall(rf"f32\[(?:1,)?{K},512,32\]\S* (\w[\w-]*)\(", body)
    assert sorted(set(written)) == ["fusion", "get-tuple-element"] and written.count("fusion") == 2, written


def test_shapes_that_do_not_fit_are_refused():
    q, k = jnp.zeros((6, 2, 32)), jnp.zeros((3, 2, 9, 32))
    bounds = jnp.zeros((6, 2, 2), jnp.int32)
    wrong = [
        (q[:5], bounds, k, k),
        (q, bounds[:, :1], k, k),
        (q, bounds, k, k[:, :, :8]),
        (q[..., :8], bounds, k[..., :8], k[..., :8]),
    ]
    for operands in wrong:
        with pytest.raises(ValueError, match="don't fit; H must be 16 n"):
            getattr(cpu_kernels.attention, "__wrapped__", cpu_kernels.attention)(*operands, 1)


def test_however_the_work_is_cut_the_numbers_differ_by_rounding_only():
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.normal(size=(2, 3, 48)), jnp.float32)
    k, v = (jnp.asarray(rng.normal(size=(1, 2, 333, 48)), jnp.float32) for _ in range(2))
    bounds = jnp.asarray([[[0, 333], [5, 6], [7, 7]], [[64, 300], [0, 1], [332, 333]]], jnp.int32)
    whole = np.asarray(cpu_kernels.attention(q, bounds, k, v, 1))
    assert not whole[0, 2].any()
    for parts in (2, 3, 8, 50):
        np.testing.assert_allclose(cpu_kernels.attention(q, bounds, k, v, parts), whole, atol=1e-6)
    for m in range(2):
        np.testing.assert_allclose(whole[m, 1], v[0, m, int(bounds[m, 1, 0])], atol=1e-6)  # one slot: its value
