"""Sampling against a sort: what stays possible, and how often each token is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError

ADJUST = jax.jit(lambda sampling, logits, seen: sampling.adjust(logits, seen))
VOCAB = 11  # one size, so that each set of options compiles once
ON_A_GRID = st.integers(-8, 8).map(lambda i: i / 2)  # many ties, zeros of both signs below
LOGIT = st.one_of(
    ON_A_GRID,
    st.sampled_from([0.0, -0.0, 1e4, -1e4, 1e-30]),
    st.floats(-50, 50, width=32),
)


def reference(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, penalty=1.0, seen=None):
    """Return the sets that must be kept and that may be kept (they differ by what rounding decides)."""
    x = logits.astype(np.float64)
    if penalty != 1:
        x = np.where(seen, np.where(x > 0, x / penalty, x * penalty), x)
    x = x / temperature
    must = may = np.ones(len(x), bool)
    if top_k:
        must = may = x >= np.sort(x)[::-1][min(top_k, len(x)) - 1]
    if top_p < 1:
        p = np.where(may, np.exp(x - x.max()), 0)
        p /= p.sum()
        above = np.array([p[x > v].sum() for v in x])  # kept while what is strictly above does not suffice
        must, may = must & (above < top_p - 1e-5), may & (above < top_p + 1e-5)
    if min_p:
        gap = x - x.max() - np.log(min_p)
        slack = 1e-5 * np.maximum(1, np.abs(x.max()))
        must, may = must & (gap >= slack), may & (gap >= -slack)
        must = must | (x == x.max())
    return must, may, x


@settings(max_examples=300)
@given(
    logits=st.lists(LOGIT, min_size=VOCAB, max_size=VOCAB),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, VOCAB, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 0.99]),
    penalty=st.sampled_from([1.0, 1.3, 0.5]),
    seen=st.lists(st.booleans(), min_size=VOCAB, max_size=VOCAB),
)
@example([0.0] * VOCAB, 1.0, 3, 0.5, 0.0, 1.0, [False] * VOCAB)  # all tied: all kept
@example([0.0, -0.0] * 5 + [-1.0], 1.0, 1, 1.0, 0.0, 1.0, [False] * VOCAB)
@example([1e4] + [-1e4] * 10, 0.05, 0, 0.999999, 0.99, 1.3, [True] * VOCAB)
def test_adjust_keeps_what_a_sort_keeps(logits, temperature, top_k, top_p, min_p, penalty, seen):
    sampling = Sampling.of(temperature, top_k, top_p, min_p, penalty)
    row = np.array(logits, np.float32)
    found = np.asarray(ADJUST(sampling, row[None], np.array(seen)[None]))[0]
    must, may, x = reference(row, temperature, top_k, top_p, min_p, penalty, np.array(seen))
    kept = np.isfinite(found)
    assert kept[must].all() and not kept[~may].any()
    assert kept[np.argmax(x)]  # never empty
    np.testing.assert_allclose(found[kept], x[kept], rtol=1e-5)


def test_rows_are_adjusted_on_their_own():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 300)).astype(np.float32) * 4
    sampling = Sampling.of(0.8, 40, 0.7, 0.02)
    together = np.asarray(ADJUST(sampling, logits, None))
    for row in range(5):
        must, may, _ = reference(logits[row], 0.8, 40, 0.7, 0.02)
        kept = np.isfinite(together[row])
        assert kept[must].all() and not kept[~may].any()
        np.testing.assert_array_equal(together[row], np.asarray(ADJUST(sampling, logits[row : row + 1], None))[0])


@pytest.mark.parametrize("options", [{}, dict(top_k=4), dict(top_p=0.8), dict(min_p=0.2)], ids=str)
def test_draws_follow_the_adjusted_distribution(options):
    sampling = Sampling.of(0.9, **options)
    logits = np.array([1.0, 0.2, -0.5, 2.0, 0.2, -3.0, 1.4], np.float32)
    draws = 20_000
    wide = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    keys = jax.vmap(jax.random.key)(jnp.arange(draws))
    adjusted = np.asarray(sampling.adjust(jnp.asarray(logits)[None], None), np.float64)[0]
    expected = np.exp(adjusted - adjusted.max()) / np.exp(adjusted - adjusted.max()).sum()
    possible = expected > 0
    for count in (0, 7):  # across rows at one step; below, across the steps of one row
        tokens = np.asarray(sampling.draw(wide, None, keys, jnp.full(draws, count)))
        found = np.bincount(tokens, minlength=len(logits))
        assert found[~possible].sum() == 0
        assert stats.chisquare(found[possible], expected[possible] * draws).pvalue > 1e-3
    one = jnp.broadcast_to(keys[3], (draws,))
    found = np.bincount(np.asarray(sampling.draw(wide, None, one, jnp.arange(draws))), minlength=len(logits))
    assert stats.chisquare(found[possible], expected[possible] * draws).pvalue > 1e-3


def test_greedy_takes_the_best_and_the_penalty_moves_it():
    logits = jnp.array([[1.0, 2.0, 1.9], [-1.0, -3.0, -1.1]])
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    count = jnp.zeros(2, jnp.int32)
    assert Sampling.of().draw(logits, None, keys, count).tolist() == [1, 0]
    seen = jnp.array([[False, True, False], [True, False, False]])
    assert Sampling.of(repetition_penalty=1.2).draw(logits, seen, keys, count).tolist() == [2, 2]


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=float("inf")),
        dict(temperature=float("nan")),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=1.0),
        dict(min_p=-0.1),
        dict(repetition_penalty=0.0),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(InputError, match=f"{name}={value}".replace(".", r"\.")):
        Sampling.of(**options)
