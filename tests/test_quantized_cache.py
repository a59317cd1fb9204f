"""Quantized caches: how far off their numbers are, what attention over them is, and what they cost in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config
from test_cache import with_kind

from jaxinfer.cache import kivi, packed_attention
from jaxinfer.cache.dense import Dense, DenseLayer
from jaxinfer.cache.groups import dequantize_groups, quantize_groups
from jaxinfer.cache.kivi import Kivi, KiviLayer
from jaxinfer.cache.quantized import QuantizedCache, quantize
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Attention
from jaxinfer.ops.attention import Scaled, attention
from jaxinfer.ops.online_attention import online_attention
from jaxinfer.passes import apply
from jaxinfer.session import Session
from jaxinfer.tree import select

K, N, H = 2, 4, 8
ATTEND = dict(scale=0.5, window=None, softcap=None)
DENSE = jax.jit(attention, static_argnames=("scale", "window", "softcap"))
ONLINE = jax.jit(online_attention, static_argnames=("scale", "window", "softcap"))


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def integers(*values: int) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e5])
def test_int8_is_half_a_step_off_at_most(size):
    x = draw(0, 3, 2, 50, 16) * size
    x[0, 0, 0] = 0
    codes, scale = jax.jit(quantize, static_argnums=1)(x, "int8")
    assert codes.dtype == jnp.int8 and int(jnp.abs(codes).max()) == 127
    error = np.abs(np.asarray(codes, np.float64) * np.asarray(scale, np.float64)[..., None] - x)
    assert (error <= np.asarray(scale, np.float64)[..., None] / 2 * (1 + 1e-6)).all()
    assert not np.asarray(codes[0, 0, 0]).any()


def test_fp8_keeps_three_bits_of_mantissa():
    x = draw(0, 3, 2, 50, 16)
    codes, scale = quantize(jnp.asarray(x), "float8_e4m3fn")
    codes = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    back = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)[..., None]
    large = np.abs(x) > np.asarray(scale, np.float64)[..., None] * 2.0**-6  # the others are subnormal
    assert large.mean() > 0.99 and (np.abs(back - x)[large] <= np.abs(x)[large] * 2.0**-4 * 1.01).all()
    assert np.isfinite(back).all() and np.abs(np.asarray(codes, np.float32)).max() == 448


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_code_of_fp8_is_its_number(dtype):
    """A value is read by a query that sees it alone."""
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)  # 0x7F is NaN
    one = jnp.ones((len(codes), 1, 1, 1), jnp.bfloat16)
    k, v = (Scaled(jnp.asarray(x.reshape(len(codes), 1, 1, 1)), one[..., 0]) for x in (np.zeros_like(codes), codes))
    found = ONLINE(jnp.ones_like(one, dtype), k, v, jnp.zeros((len(codes), 1), jnp.int32), scale=1.0)
    np.testing.assert_array_equal(
        found[:, 0, 0, 0].astype(jnp.float32), codes.view(jnp.float8_e4m3fn).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("qtype", "T", "S", "starts", "window", "softcap"),
    [
        ("int8", 1, 63, [62, 0], None, None),
        ("int8", 1, 1300, [5, 511, 512, 1299], None, None),
        ("float8_e4m3fn", 1, 1300, [1024], 7, None),
        ("float8_e4m3fn", 5, 1300, [0, 700], 600, 3.0),
        ("int8", 300, 700, [400, 11], 129, None),  # over the blocks of queries and of slots
    ],
)
def test_attention_over_codes_is_that_over_their_numbers(qtype, T, S, starts, window, softcap):
    """Slots that no query sees hold NaN where they can; the last row has padding, and then nothing else."""
    B = len(starts)
    counts = np.array([T] * (B - 1) + [max(T - 3, 0)])
    positions = np.where(np.arange(T) < counts[:, None], np.asarray(starts)[:, None] + np.arange(T), -1)
    q = jnp.asarray(draw(0, B, T, N, H))
    k, v = (quantize(jnp.asarray(draw(seed, B, K, S, H)), qtype) for seed in (1, 2))
    unused = (np.arange(S) > positions.max(axis=1, keepdims=True))[:, None, :, None]
    worst = -128 if qtype == "int8" else 0x7F  # of fp8, NaN
    nan_scale = [jnp.where(unused[..., 0], jnp.nan, x.scale) for x in (k, v)]
    with_nan = [Scaled(jnp.where(unused, worst, x.values), scale) for x, scale in zip((k, v), nan_scale, strict=True)]
    with_nan = [Scaled(x.values.astype(k.values.dtype), x.scale) for x in with_nan]
    options = dict(scale=0.5, window=window, softcap=softcap)
    found = ONLINE(q, *with_nan, jnp.asarray(positions, jnp.int32), **options)
    full = [x.values.view(qtype).astype(jnp.float32) * x.scale.astype(jnp.float32)[..., None] for x in (k, v)]
    expected = DENSE(q, *full, jnp.asarray(positions, jnp.int32), **options)
    assert np.isfinite(found).all() and found.dtype == q.dtype
    np.testing.assert_allclose(found[positions >= 0], expected[positions >= 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("G", "H"), [(4, 8), (12, 8), (32, 64)])
def test_groups_are_half_a_step_off_at_most(bits, G, H):
    k, v = draw(0, 2, 3, 4, G, H) + 5 * draw(1, H), draw(2, 2, 3, 4, G, H)
    k[0, 0, 0], v[0, 0, 0, 0] = 1.5, 0  # grids of one number
    k[0, 1] = k[0, 1] * 0.01 + 1e4  # an offset whose rounding is larger than the range
    groups = jax.jit(quantize_groups, static_argnums=2)(k, v, bits)
    assert groups.k_codes.shape == (2, 3, 4 * G * bits // 8, H) == groups.v_codes.shape
    assert (groups.count, groups.size, groups.bits) == (4, G, bits)
    k_step = np.asarray(groups.k_scale, np.float64)[:, :, :, None]
    v_step = np.asarray(groups.v_scale, np.float64).reshape(2, 3, -1, 4, G).transpose(0, 1, 3, 4, 2)
    steps = (k_step, np.repeat(v_step, G if H % G == 0 else H, axis=-1))
    for x, found, step in zip((k, v), dequantize_groups(groups, jnp.float32), steps, strict=True):
        error = np.abs(np.asarray(found, np.float64).reshape(x.shape) - x)
        assert (error <= step * 0.501 + 1e-6 * np.abs(x)).all()
        assert error.max() > 0


@pytest.mark.parametrize("bits", [2, 4])
def test_packing_is_a_round_trip(bits):
    """Numbers that are on the grid already come back as they were."""
    top = 2**bits - 1
    codes = np.random.default_rng(0).integers(0, top + 1, (2, 2, 3, 4, 16)).astype(np.float32)
    codes[..., 0, :], codes[..., 1, :] = 0, top  # a channel's grid then spans all codes; and a value's
    codes[..., 0], codes[..., 4], codes[..., 8], codes[..., 12] = 0, 0, 0, 0
    codes[..., 1], codes[..., 5], codes[..., 9], codes[..., 13] = top, top, top, top
    k, v = codes.copy(), codes.copy()
    k[..., 0, :], k[..., 1, :] = 0, top
    found_k, found_v = dequantize_groups(quantize_groups(jnp.asarray(k), jnp.asarray(v), bits), jnp.float32)
    np.testing.assert_array_equal(found_k.reshape(k.shape), k)
    np.testing.assert_array_equal(found_v.reshape(v.shape), v)


def test_a_grid_a_channel_suits_keys_that_have_outlier_channels():
    x = draw(0, 1, 1, 8, 32, 64)
    x[..., [3, 40]] *= 30
    groups = quantize_groups(jnp.asarray(x), jnp.asarray(x), 4)  # the same numbers by channel and by token
    by_channel, by_token = (np.asarray(y).reshape(x.shape) for y in dequantize_groups(groups, jnp.float32))
    plain = np.delete(np.arange(64), [3, 40])
    assert np.square(by_channel - x)[..., plain].mean() < 0.1 * np.square(by_token - x)[..., plain].mean()


def kivi_reference(kind: Kivi, q, k, v, window=None) -> np.ndarray:
    """Return attention of one row in float64, a query at a time, each with its own tokens quantized."""
    T, G = len(k), kind.group
    M = T // G
    cut = lambda x: jnp.asarray(x[: M * G].reshape(M, G, K, H).transpose(2, 0, 1, 3)[None])  # noqa: E731
    packed = dequantize_groups(quantize_groups(cut(k), cut(v), kind.bits), jnp.float32) if M else (k, v)
    packed = [np.asarray(x[0], np.float64).transpose(1, 0, 2) for x in packed]
    out = np.zeros((T, N, H))
    for p in range(T):
        old = G * max(0, (p + 1 - kind.residual) // G)
        keys, values = (np.concatenate([a[:old], b[old : p + 1]]) for a, b in zip(packed, (k, v), strict=True))
        first = 0 if window is None else max(0, p - window + 1)
        for n in range(N):
            scores = keys[first:, n // 2] @ q[p, n].astype(np.float64) * 0.5
            weights = np.exp(scores - scores.max())
            out[p, n] = weights / weights.sum() @ values[first:, n // 2]
    return out


@functools.partial(jax.jit, static_argnames="window")
def step(cache, q, k, v, start, counts, window=None):
    offset = jnp.arange(k.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(offset < counts[:, None], start[:, None] + offset, -1)
    return cache.append(k, v, start, counts).attend(q, positions, **{**ATTEND, "window": window})


def run(kind, q, k, v, pieces, window=None, cache=None, start=0, slots=None) -> tuple[np.ndarray, object]:
    """Feed rows in pieces from `start`; row b has b tokens fewer in every piece of more than one, padded with NaN."""
    B, T = q.shape[:2]
    cache = kind.create(B, T if slots is None else slots, K, H, jnp.float32) if cache is None else cache
    at, out = np.full(B, start), np.zeros(q.shape)
    for size in pieces:
        counts = np.array([min(T - at[b], size - (b if size > 1 else 0)) for b in range(B)])
        index = np.minimum(at[:, None] + np.arange(size), T - 1)
        real = (np.arange(size) < counts[:, None])[..., None, None]
        new = [np.where(real, x[np.arange(B)[:, None], index], np.nan).astype(np.float32) for x in (q, k, v)]
        new[0] = np.nan_to_num(new[0])
        y, cache = step(cache, *map(jnp.asarray, new), integers(*at), integers(*counts), window)
        for b in range(B):
            out[b, at[b] : at[b] + counts[b]] = y[b, : counts[b]]
        at = at + counts
    assert (at == T).all()
    return out, cache


LONG = 330
PIECES = {
    "at_once": [LONG + 5],  # over a block of queries
    "bit_by_bit": [120, 20, 20, *[1] * 75, 20, 60, *[20] * 2],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize(
    ("kind", "window"),
    [
        (Kivi(group=8, residual=10), None),
        (Kivi(group=8, residual=10, page=24), None),
        (Kivi(bits=2, group=12, residual=0), 50),
        (Kivi(group=32, residual=33), 5),
    ],
    ids=str,
)
def test_each_query_reads_its_own_tokens_packed(kind, window, pieces):
    """Whatever the pieces: prefill, and steps whose recent tokens have gone round the ring, give the same."""
    q, k, v = draw(0, 2, LONG, N, H), draw(1, 2, LONG, K, H), draw(2, 2, LONG, K, H)
    pieces = [*pieces, *[1] * 20]  # what a row still lacks, and then padding
    found, _ = run(kind, q, k, v, pieces, window)
    for b in range(2):
        np.testing.assert_allclose(found[b], kivi_reference(kind, q[b], k[b], v[b], window), rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("page", [None, 16])
def test_kivi_is_rewound_exactly_within_its_slack(batch, page):
    kind = Kivi(group=8, residual=10, page=page)
    kept, T = 260, LONG
    q, k, v = draw(0, batch, T, N, H), draw(1, batch, T, K, H), draw(2, batch, T, K, H)
    expected, _ = run(kind, q, k, v, [T + 5, *[1] * 10])
    _, cache = run(kind, q[:, :kept], k[:, :kept], v[:, :kept], [kept + 75, *[1] * 5], slots=T)
    assert kivi.SLACK <= cache.exact_rewind < 50
    other = [draw(seed, batch, cache.exact_rewind, *shape) for seed, shape in ((3, (N, H)), (4, (K, H)), (5, (K, H)))]
    longer = [np.concatenate([x[:, :kept], y], axis=1) for x, y in zip((q, k, v), other, strict=True)]
    _, cache = run(kind, *longer, [cache.exact_rewind, *[1] * 5], cache=cache, start=kept)
    cache = cache.rewind(integers(*[kept] * batch))
    found, _ = run(kind, q, k, v, [1, 1, 1, *[20] * 5], cache=cache, start=kept)
    np.testing.assert_allclose(found[:, kept:], expected[:, kept:], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("T", "window", "softcap"), [(1, None, None), (8, 100, 2.0), (90, None, None)])
def test_the_kernels_read_the_packed_groups_of_a_cache(monkeypatch, T, window, softcap):
    """Rows before, across and at a boundary, one with nothing packed at first, and one of padding alone."""
    kind, filled = Kivi(group=64, residual=20), np.array([200, 207, 211, 40, 150])
    B, S = len(filled), 512
    cache = kind.create(B, S, K, 64, jnp.float32)
    k, v, q = map(jnp.asarray, (draw(0, B, 320, K, 64), draw(1, B, 320, K, 64), draw(2, B, T, N, 64)))
    cache = cache.append(k, v, integers(*[0] * B), integers(*filled + T)).rewind(integers(*filled))
    counts = np.array([T, T, T, T, 0])
    positions = jnp.asarray(np.where(np.arange(T) < counts[:, None], filled[:, None] + np.arange(T), -1), jnp.int32)
    for name, blocks in (
        ("kivi_attention", {"slots": S, "heads": 2, "buffers": 2, "splits": 1}),
        ("kivi_prefill_attention", {"queries": 48, "slots": 128, "rows": 48, "buffers": 2}),
    ):
        module = getattr(packed_attention, name)
        monkeypatch.setattr(module, "tpu", functools.partial(module.tpu, interpret=True, blocks=blocks))
    options = dict(residual=kind.residual, scale=0.2, window=window, softcap=softcap)
    kernel = functools.partial(packed_attention._by_kernel, consecutive=True)
    parts = (f(q, cache.groups, positions, **options) for f in (kernel, packed_attention._by_blocks))
    found, expected = (np.asarray(out * np.exp(lse - 3)[..., None]) for out, lse in parts)
    assert np.abs(expected[:3]).max() > 0.01 and not expected[3, :43].any() and not expected[4].any()
    np.testing.assert_allclose(found[:4], expected[:4], rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.isfinite(found).all()


def test_within_its_residual_kivi_is_the_dense_cache():
    q, k, v = draw(0, 1, 64, N, H), draw(1, 1, 64, K, H), draw(2, 1, 64, K, H)
    expected, _ = run(Dense(), q, k, v, [50, *[1] * 14], slots=300)
    found, cache = run(Kivi(), q, k, v, [50, *[1] * 14], slots=300)
    assert isinstance(cache, KiviLayer)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    found, cache = run(Kivi(residual=1 << 30), q, k, v, [50, *[1] * 14], slots=300)
    assert isinstance(cache, DenseLayer) and cache.exact_rewind is None
    np.testing.assert_array_equal(found, expected)


def cache_bytes(kind, slots: int, head_dim: int, dtype) -> int:
    cache = jax.eval_shape(lambda: kind.create(1, slots, K, head_dim, dtype))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def test_bytes_a_token():
    """Of two heads of 64: 256 numbers."""
    for kind, expected in [(Dense(), 1024), (QuantizedCache(), 264), (Kivi(), 160), (Kivi(bits=2), 96)]:
        assert cache_bytes(kind, 8192, 64, jnp.float32) - cache_bytes(kind, 4096, 64, jnp.float32) == 4096 * expected


@pytest.mark.parametrize("kind", [QuantizedCache(), Kivi(), Kivi(page=64)], ids=str)
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (3, 1), (1, 20)])
def test_a_step_never_holds_the_cache_unpacked(kind, batch, T):
    slots, head = 16384, 32
    cache = jax.eval_shape(lambda: kind.create(batch, slots, K, head, jnp.float32))
    q, k = (jax.ShapeDtypeStruct((batch, T, n, head), jnp.float32) for n in (N, K))
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    memory = jax.jit(step.__wrapped__, donate_argnums=0).lower(cache, q, k, k, row, row).compile().memory_analysis()
    unpacked = 2 * batch * K * slots * head * 4
    assert memory.temp_size_in_bytes < unpacked / 4
    assert memory.argument_size_in_bytes < unpacked / 3


def test_a_session_computes_a_row_again_where_the_cache_cant_go_back():
    program = random_program(tiny_config(num_layers=1, windows=(None,)))
    program = program.replace(model=with_kind(program.model, Kivi(group=8, residual=8)))
    row = [(7 * i) % 90 + 3 for i in range(120)]
    session = Session(program)

    def feed(row, computed):
        fresh = Session(program)
        fresh.feed([row])
        assert session.feed([row], room=20) == computed
        np.testing.assert_allclose(session._logits, fresh._logits, rtol=0, atol=1e-4)

    feed(row, 120)
    limit = session._cache.exact_rewind
    feed(row[: 120 - limit + 1], 1)  # as far as it can: one token gives the logits
    feed(row[: 120 - limit], 120 - limit)  # one more, counted from the longest that it was
    answer = [t for new in session.decode(14) for t in new[0]]
    row = [*row[: 120 - limit], *answer[:13]]
    feed([*row[:-limit], 5], 1)
    feed([*row[: -limit - 1], 6], len(row) - limit)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Kivi(bits=3), "bits=3: must be 2 or 4"),
        (lambda: Kivi(group=0), "group=0"),
        (lambda: Kivi(residual=-1), "residual=-1"),
        (lambda: Kivi(bits=2, group=6), "group=6 of 2 bits: must be a multiple of 4"),
        (lambda: Kivi(page=48), "page=48: must be a multiple of group=32 tokens"),
        (lambda: apply(random_program(tiny_config()), "kv_paged:store=int5"), "kv_paged:store='int5': did you"),
        (lambda: apply(random_program(tiny_config()), "kv_int4:group=0"), "group=0"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_passes_give_layers_their_cache(tiny):
    mixed = apply(
        tiny, ("kv_int8", {"where": r"layers\.0\..*"}), ("kv_int4", {"where": r"layers\.1\..*", "residual": 7})
    )
    caches = [node.cache for node in select(mixed.model, Attention).values()]
    assert caches == [QuantizedCache(), Kivi(residual=7)]
    with pytest.raises(InputError, match="each layer has one cache"):
        apply(tiny, "kv_fp8", ("kv_int8", {"where": r"layers\.1\..*"}))
    with pytest.raises(InputError, match="matches no Attention"):
        apply(tiny, ("kv_fp8", {"where": "nothing"}))
