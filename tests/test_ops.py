"""Operations against their equations in float64, at sizes that fit nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.ops.attention import attention
from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.norm import rms_norm
from jaxinfer.ops.rope import RopeConfig, attention_magnitude, rotate

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # absolute, for outputs of order one
ATTENTION = jax.jit(attention, static_argnames=("scale", "window", "softcap"))


def draw(seed: int, *shape: int, dtype="float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def attend_one_by_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: np.ndarray,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> np.ndarray:
    """Return attention a query at a time, over exactly the slots that it sees; zeros for padding."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    group = N // k.shape[1]
    out = np.zeros((B, T, N, H))
    for b in range(B):
        for t in range(T):
            p = int(positions[b, t])
            if p < 0:
                continue
            first = 0 if window is None else max(p - window + 1, 0)
            for n in range(N):
                scores = k[b, n // group, first : p + 1] @ q[b, t, n] * scale
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ v[b, n // group, first : p + 1]
    return out


def check_attention(T, S, starts, counts=None, N=4, K=2, H=16, window=None, softcap=None, dtype="float32", seed=0):
    """Attend with row b's queries at positions from starts[b]; every slot that no query may see holds NaN."""
    B = len(starts)
    counts = [T] * B if counts is None else counts
    q, k, v = draw(seed, B, T, N, H, dtype=dtype), draw(seed + 1, B, K, S, H), draw(seed + 2, B, K, S, H)
    offset = np.arange(T)
    positions = np.stack([np.where(offset < n, s + offset, -1) for s, n in zip(starts, counts, strict=True)])
    unused = np.arange(S)[None] > positions.max(axis=1, keepdims=True)
    k, v = (jnp.where(unused[:, None, :, None], jnp.nan, x).astype(dtype) for x in (k, v))
    options = dict(scale=H**-0.5, window=window, softcap=softcap)
    found = ATTENTION(q, k, v, jnp.asarray(positions, jnp.int32), **options)
    assert found.dtype == q.dtype and found.shape == q.shape
    found = np.asarray(found, np.float64)
    assert np.isfinite(found).all()  # padding too
    expected = attend_one_by_one(q, k, v, positions, **options)
    real = positions >= 0
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("N", "K"), [(2, 2), (4, 2), (4, 1), (8, 2), (8, 1), (7, 7), (6, 3)], ids=str)
def test_attention_of_grouped_heads(N, K, dtype):
    check_attention(T=63, S=63, starts=[0, 0], counts=[63, 60], N=N, K=K, dtype=dtype)


@pytest.mark.parametrize(
    ("T", "S", "starts"),
    [
        (60, 63, [3, 0]),
        (1, 63, [62, 0]),
        (1, 700, [5, 130, 300, 699]),  # a step of rows that are far apart
        (1, 700, [699]),
        (63, 300, [237, 0]),
        (300, 300, [0]),  # over the block of queries
        (300, 700, [400, 11]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, "float32"), (7, "float32"), (129, "float32"), (1000, "float32"), (None, "bfloat16"), (7, "bfloat16")],
    ids=str,
)
def test_attention_at_odd_sizes(T, S, starts, window, dtype):
    check_attention(T, S, starts, window=window, dtype=dtype, N=2, K=1, H=8)


@pytest.mark.parametrize("window", [1, 5, 63, 64])
@pytest.mark.parametrize("softcap", [None, 0.7, 50.0])
def test_attention_with_a_softcap(window, softcap):
    check_attention(T=13, S=70, starts=[50, 0], counts=[13, 9], window=window, softcap=softcap)


def test_attention_of_padding_rows_is_finite():
    check_attention(T=5, S=20, starts=[4, 0, 0], counts=[5, 0, 2])
    check_attention(T=5, S=300, starts=[0, 0], counts=[0, 0])
    check_attention(T=5, S=300, starts=[0, 0], counts=[0, 0], window=4)
    check_attention(T=1, S=300, starts=[0, 200], counts=[0, 1], window=4)
    check_attention(T=300, S=300, starts=[0, 0], counts=[3, 0], window=4)  # a whole block of padding


def test_attention_of_a_float16_cache_keeps_the_query_dtype():
    q, kv = draw(0, 1, 3, 2, 8), draw(1, 1, 2, 9, 8, dtype="float16")
    out = ATTENTION(q, kv, kv, jnp.arange(3, dtype=jnp.int32)[None], scale=1.0)
    assert out.dtype == jnp.float32


HEAD = 16
POSITIONS = np.array([[0, 1, 2, 17, 63, 300, 1000]], np.int32)
THETA = 1e4


def inverse(theta=THETA, head=HEAD):
    return theta ** (-2.0 * np.arange(head // 2) / head)


def expected_rotation(x, angles, magnitude=1.0):
    """Multiply the complex number of each half-pair by `magnitude * exp(i * angle)`."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * magnitude * np.exp(1j * angles)[:, :, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def llama3_frequencies(factor=8.0, low=1.0, high=4.0, context=64):
    """Meta's apply_scaling, a frequency at a time."""
    out = []
    for f in inverse():
        wavelength = 2 * math.pi / f
        if wavelength < context / high:
            out.append(f)
        elif wavelength > context / low:
            out.append(f / factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return np.array(out)


def yarn_frequencies(factor=4.0, fast=8.0, slow=1.0, context=64, truncate=True):
    """The ramp of 2309.00071: a dimension d turns r(d) = context / wavelength(d) times in the trained context."""

    def dimension(turns):
        return HEAD * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = dimension(fast), dimension(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    keep = [1 - min(max((d - max(low, 0)) / (min(high, HEAD - 1) - max(low, 0)), 0), 1) for d in range(HEAD // 2)]
    return np.array([(1 - g) * f / factor + g * f for g, f in zip(keep, inverse(), strict=True)])


LONGEST = POSITIONS.max() + 1
ROPES = {
    "default": (RopeConfig(), inverse(), 1.0),
    "another theta": (RopeConfig(theta=500.0), inverse(500.0), 1.0),
    "linear": (RopeConfig(kind="linear", factor=4.0), inverse() / 4, 1.0),
    "ntk": (
        RopeConfig(kind="ntk", factor=4.0, original_context=64),
        inverse(THETA * (4.0 * LONGEST / 64 - 3.0) ** (HEAD / (HEAD - 2))),
        1.0,
    ),
    "ntk within the trained context": (RopeConfig(kind="ntk", factor=4.0, original_context=2048), inverse(), 1.0),
    "llama3": (RopeConfig(kind="llama3", factor=8.0, original_context=64), llama3_frequencies(), 1.0),
    "llama3 edges": (
        RopeConfig(kind="llama3", factor=2.0, original_context=64, low_freq_factor=2.0, high_freq_factor=3.0),
        llama3_frequencies(2.0, 2.0, 3.0),
        1.0,
    ),
    "yarn": (
        RopeConfig(kind="yarn", factor=4.0, original_context=64, beta_fast=8.0),
        yarn_frequencies(),
        0.1 * math.log(4.0) + 1,
    ),
    "yarn, exact ramp": (
        RopeConfig(kind="yarn", factor=4.0, original_context=64, beta_fast=8.0, truncate=False),
        yarn_frequencies(truncate=False),
        0.1 * math.log(4.0) + 1,
    ),
    "yarn, given magnitude": (
        RopeConfig(kind="yarn", factor=4.0, original_context=64, beta_fast=8.0, attention_factor=0.7),
        yarn_frequencies(),
        0.7,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_a_rotation_by_position_times_frequency(name):
    rope, frequencies, magnitude = ROPES[name]
    x = draw(0, 1, POSITIONS.shape[1], 3, HEAD)
    found = rotate(x, jnp.asarray(POSITIONS), rope)
    expected = expected_rotation(x, POSITIONS[..., None] * frequencies, magnitude)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4)  # float32 angles of up to 1000 radians
    assert attention_magnitude(rope) == pytest.approx(magnitude)
    half = rotate(x.astype(jnp.bfloat16), jnp.asarray(POSITIONS), rope)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), expected, rtol=0, atol=5e-2)


def test_ntk_stretches_each_row_by_its_own_length():
    rope = RopeConfig(kind="ntk", factor=4.0, original_context=8)
    positions = np.stack([np.arange(12), np.r_[np.arange(5), [-1] * 7]]).astype(np.int32)
    x = draw(0, 2, 12, 1, HEAD)
    found = np.asarray(rotate(x, jnp.asarray(positions), rope))
    long = inverse(THETA * (4.0 * 12 / 8 - 3.0) ** (HEAD / (HEAD - 2)))
    np.testing.assert_allclose(found[0], expected_rotation(x[:1], positions[:1, :, None] * long)[0], atol=1e-5)
    np.testing.assert_allclose(
        found[1, :5], expected_rotation(x[1:], positions[1:, :, None] * inverse())[0, :5], atol=1e-5
    )


@settings(max_examples=25)
@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 200))
def test_rotated_products_depend_on_the_distance_only(p, s, shift):
    q, k = draw(1, 1, 1, 1, HEAD), draw(2, 1, 1, 1, HEAD)
    rope = RopeConfig(theta=100.0)

    def product(p, s):
        return float((rotate(q, jnp.array([[p]]), rope) * rotate(k, jnp.array([[s]]), rope)).sum())

    assert product(p, s) == pytest.approx(product(p + shift, s + shift), abs=2e-3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(5,), (3, 63), (2, 1, 4, 60)], ids=str)
def test_rms_norm(shape, dtype):
    x, scale = draw(0, *shape, dtype=dtype), draw(1, shape[-1])
    y = np.asarray(x, np.float64)
    expected = y / np.sqrt((y * y).mean(-1, keepdims=True) + 0.1) * np.asarray(scale, np.float64)
    found = rms_norm(x, scale, 0.1)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=TOLERANCE[dtype])
    assert np.isfinite(rms_norm(x * 0, scale, 1e-6)).all()


EQS = {
    "btd,dnh->btnh": ((24,), (24, 3, 8)),
    "btd,nhd->btnh": ((24,), (3, 8, 24)),
    "btnh,nhd->btd": ((3, 8), (3, 8, 20)),
    "btnh,dnh->btd": ((3, 8), (20, 3, 8)),
    "btd,df->btf": ((24,), (24, 13)),
    "btd,vd->btv": ((24,), (63, 24)),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [(1, 1), (1, 2), (3, 1), (2, 7)], ids=str)
@pytest.mark.parametrize("eq", EQS)
def test_einsum(eq, rows, dtype):
    inner, kernel_shape = EQS[eq]
    x = draw(0, *rows, *inner, dtype=dtype)
    kernel = (draw(1, *kernel_shape) * math.prod(inner) ** -0.5).astype(dtype)
    found = einsum(eq, x, kernel)
    expected = np.einsum(eq, np.asarray(x, np.float64), np.asarray(kernel, np.float64))
    assert found.dtype == x.dtype and found.shape == expected.shape
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=TOLERANCE[dtype])


def test_one_row_of_bfloat16_equals_it_among_others():
    """One row takes a road of its own on CPU."""
    x, kernel = draw(0, 2, 1, 96, dtype="bfloat16"), draw(1, 96, 50, dtype="bfloat16")
    together = einsum("btd,df->btf", x, kernel)
    for row in range(2):
        np.testing.assert_array_equal(einsum("btd,df->btf", x[row : row + 1], kernel)[0], together[row])
        jitted = jax.jit(einsum, static_argnums=0)("btd,df->btf", x[row : row + 1], kernel)
        np.testing.assert_array_equal(jitted[0], together[row])


@pytest.mark.parametrize("eq", ["btd,df->tbf", "btd,fe->btf", "btd,dd->btd", "btnh,hnd->btd", "btd,ndh->btnh"])
def test_einsum_refuses_other_forms(eq):
    with pytest.raises(ValueError, match="eq="):
        einsum(eq, jnp.ones((1, 1, 4)), jnp.ones((4, 4)))
