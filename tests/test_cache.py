"""The laws of caches: every kind in KINDS keeps all of them, and a new one is a line there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model, tiny_config

from jaxinfer.cache.base import CacheKind, LayerCache
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.cache.streaming import Streaming
from jaxinfer.models.transformer import Attention, Transformer
from jaxinfer.ops.rope import RopeConfig
from jaxinfer.tree import replace, rewrite

KINDS: dict[str, CacheKind] = {
    "dense": Dense(),
    "int8": QuantizedCache(),
    "fp8": QuantizedCache(qtype="float8_e4m3fn"),
    "kivi": Kivi(group=4, residual=3),
    "kivi_2_bits": Kivi(bits=2, group=4, residual=0),
    "kivi_long_residual": Kivi(residual=16),
    "paged": Paged(page=4),
    "streaming": Streaming(sinks=2, window=5, rope=RopeConfig()),
    "streaming_no_sinks": Streaming(sinks=0, window=4, rope=RopeConfig()),
    "paged_int8": Paged(page=3, int8=True),
    "paged_kivi": Kivi(group=4, residual=3, page=8),
    "paged_kivi_2_bits": Kivi(bits=2, group=4, residual=0, page=4),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
K, H, S = 2, 8, 19
BOUND = 1e-5


@jax.jit
def appended(cache: LayerCache, k, v, start, counts) -> LayerCache:
    return cache.append(k, v, start, counts)


@functools.partial(jax.jit, static_argnames="window")
def attended(cache: LayerCache, q, positions, window=None) -> jax.Array:
    return cache.attend(q, positions, scale=0.5, window=window, softcap=None)[0]


def draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def integers(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def append(cache: LayerCache, seed: int, T: int, start, counts) -> LayerCache:
    """Append T random tokens a row, the same for the same seed and position; NaN in the padding."""
    B = len(start)
    every = np.random.default_rng(seed).normal(size=(2, B, 64, K, H)).astype(np.float32)
    at = np.clip(np.asarray(start)[:, None] + np.arange(T), 0, 63)
    real = (np.arange(T) < np.asarray(counts)[:, None])[:, :, None, None]
    k, v = (np.where(real, x[np.arange(B)[:, None], at], np.float32(np.nan)) for x in every)
    return appended(cache, k, v, integers(*start), integers(*counts))


def read(cache: LayerCache, length, window: int | None = None) -> list[np.ndarray]:
    """Return what queries at every position below each row's length see."""
    B, T = len(length), max(length)
    positions = np.where(np.arange(T) < np.asarray(length)[:, None], np.arange(T), -1)
    q = draw(99, B, T, 4, H)
    out = attended(cache, q, positions.astype(np.int32), window=window)
    return [np.asarray(row[:n]) for row, n in zip(out, length, strict=True)]


def check(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=BOUND)


def create(kind: CacheKind, batch: int, slots: int = S) -> LayerCache:
    return kind.create(batch, slots, K, H, jnp.float32)


@EVERY_KIND
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 7], [11, 1], [3, 1, 1, 7]], ids=str)
@pytest.mark.parametrize("window", [None, 4])
def test_chunk_size_does_not_matter(kind, pieces, window):
    for batch in (1, 2):
        whole = append(create(kind, batch), 1, 12, [0] * batch, [12] * batch)
        cache, at = create(kind, batch), 0
        for size in pieces:
            cache = append(cache, 1, size, [at] * batch, [size] * batch)
            at += size
        check(read(cache, [12] * batch, window), read(whole, [12] * batch, window))


@EVERY_KIND
@pytest.mark.parametrize("again", [1, 4])
def test_append_then_rewind_is_the_identity(kind, again):
    """For what is read now and for what is appended next."""
    lengths = [7, 3]
    before = append(create(kind, 2), 1, 7, [0, 0], lengths)
    detour = append(append(before, 2, 5, lengths, [5, 2]), 3, 1, [12, 5], [1, 1])
    after = detour.rewind(integers(*lengths))
    check(read(after, lengths), read(before, lengths))
    expected = append(before, 4, again, lengths, [again] * 2)
    found = append(after, 4, again, lengths, [again] * 2)
    check(read(found, [n + again for n in lengths]), read(expected, [n + again for n in lengths]))


@EVERY_KIND
def test_rewind_to_nothing_is_an_empty_cache(kind):
    used = append(create(kind, 2), 1, 9, [0, 0], [9, 4]).rewind(integers(0, 0))
    check(read(append(used, 2, 6, [0, 0], [6, 6]), [6, 6]), read(append(create(kind, 2), 2, 6, [0, 0], [6, 6]), [6, 6]))


@EVERY_KIND
@pytest.mark.parametrize("T", [1, 5])
def test_rows_are_independent(kind, T):
    first = draw(5, 2, 3, 9, K, H)
    later = draw(6, 2, 3, T, K, H)
    starts, counts = [9, 2, 6], [T, 1, 0]

    def run(rows):
        start = [starts[r] for r in rows]
        cache = create(kind, len(rows))
        cache = appended(cache, *first[:, jnp.array(rows)], integers(*[0] * len(rows)), integers(*start))
        return appended(cache, *later[:, jnp.array(rows)], integers(*start), integers(*[counts[r] for r in rows]))

    def outputs(rows):
        T_all = 14
        lengths = np.array([starts[r] + counts[r] for r in rows])
        positions = np.where(np.arange(T_all) < lengths[:, None], np.arange(T_all), -1)
        q = draw(7, 3, T_all, 4, H)[jnp.array(rows)]
        out = attended(run(rows), q, positions.astype(np.int32))
        return [np.asarray(row[:n]) for row, n in zip(out, lengths, strict=True)]

    together = outputs([0, 1, 2])
    check(outputs([2, 0, 1]), [together[2], together[0], together[1]])
    for row in range(3):
        check(outputs([row]), [together[row]])


@EVERY_KIND
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_a_count_of_zero_writes_nothing(kind, batch, T):
    """Wherever the row stands: the padding is NaN, and would show."""
    cache = append(create(kind, batch), 1, 8, [0] * batch, [8] * batch)
    expected = read(cache, [8] * batch)
    for start in (0, 3, 8, S - 1, S, S + 5):
        same = append(cache, 2, T, [start] * batch, [0] * batch)
        for found, row in zip(read(same, [8] * batch), expected, strict=True):
            np.testing.assert_array_equal(found, row)


@EVERY_KIND
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (2, 1), (1, 6), (2, 6)])
def test_what_passes_the_last_slot_is_dropped(kind, batch, T):
    roomy = append(create(kind, batch, 40), 1, 17, [0] * batch, [17] * batch)
    small = append(create(kind, batch), 1, 17, [0] * batch, [17] * batch)
    for start in (17, 18, 19, 20, 30):
        kept = [min(start + T, S)] * batch if start == 17 else [17] * batch  # no holes: only 17 continues the row
        large = append(roomy, 2, T, [start] * batch, [T] * batch)
        check(read(append(small, 2, T, [start] * batch, [T] * batch), kept), read(large, kept))
    full = append(create(kind, batch), 1, S, [0] * batch, [S] * batch)
    for start in (S, S + 1, S + 30):
        check(read(append(full, 2, T, [start] * batch, [T] * batch), [S] * batch), read(full, [S] * batch))


def with_kind(model: Transformer, kind: CacheKind) -> Transformer:
    return rewrite(model, Attention, ".*", lambda node: replace(node, cache=kind))


@EVERY_KIND
def test_a_whole_model_rewinds_each_row(kind):
    model = with_kind(random_model(tiny_config(windows=(5, None))), kind)

    @jax.jit
    def forward(tokens, cache, counts):
        hidden, cache = model(tokens, cache, counts)
        return model.logits(hidden), cache

    tokens = integers(*range(3, 15)).reshape(2, 6)
    _, base = forward(tokens, model.init_cache(2, S), integers(6, 4))
    _, detour = forward(tokens * 3, base, integers(6, 5))
    back = detour.rewind(integers(6, 4))
    assert back.length.tolist() == [6, 4]
    assert detour.rewind(integers(99, 0)).length.tolist() == [12, 0]  # never longer than it is
    expected, after = forward(tokens + 40, base, integers(2, 6))
    found, after_detour = forward(tokens + 40, back, integers(2, 6))
    np.testing.assert_allclose(found[0, :2], expected[0, :2], atol=BOUND)
    np.testing.assert_allclose(found[1], expected[1], atol=BOUND)
    assert after.length.tolist() == after_detour.length.tolist() == [8, 10]


@EVERY_KIND
def test_kinds_are_hashable_and_have_a_shape_without_memory(kind):
    assert hash(kind) == hash(kind)
    shapes = jax.eval_shape(lambda: create(kind, 2))
    cache = create(kind, 2)
    assert jax.tree.structure(shapes) == jax.tree.structure(cache)
    q, positions = jnp.zeros((2, 3, 4, H)), jnp.zeros((2, 3), jnp.int32)

    def step(cache):
        return append(cache, 1, 3, [0, 0], [3, 3]).attend(q, positions, scale=0.5, window=None, softcap=None)[1]

    grown = jax.eval_shape(step, cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grown) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
    jax.jit(step, donate_argnums=0)(cache)  # which refuses a buffer that is two leaves
