"""Hadamard matrices: orthonormal at every size that models have, and the fast product equals the dense one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import InputError
from jaxinfer.ops.hadamard import hadamard, hadamard_transform, has_hadamard

# A power of two; each of Paley's families, over primes and over prime powers (28, 52, 344); Williamson's (172).
SIZES = (1, 2, 4, 8, 12, 20, 24, 28, 36, 48, 52, 60, 64, 76, 140, 148, 172, 244, 344, 576, 896, 960, 1536, 2048, 3072)
# Hidden and feed-forward widths of released models: only their construction is checked, they are large.
LARGE = (4864, 5632, 8960, 11008, 13824, 14336, 18944, 27648, 28672, 29568, 53248)


@pytest.mark.parametrize("size", SIZES)
def test_orthonormal_with_entries_of_one_size(size):
    h = hadamard(size).astype(np.float64)
    np.testing.assert_allclose(np.abs(h), size**-0.5, rtol=1e-6)
    np.testing.assert_allclose(h.T @ h, np.eye(size), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transpose", [False, True])
def test_fast_transform_equals_the_dense_product(size, transpose):
    x = jax.random.normal(jax.random.key(size), (2, 3, size))
    h = hadamard(size)
    dense = np.asarray(x, np.float64) @ (h.T if transpose else h)
    np.testing.assert_allclose(hadamard_transform(x, transpose), dense, atol=2e-5)


def test_transpose_is_the_inverse_where_the_base_is_not_symmetric():
    h = hadamard(24)
    assert np.abs(h - h.T).max() > 0.1
    x = jax.random.normal(jax.random.key(0), (5, 24))
    np.testing.assert_allclose(hadamard_transform(hadamard_transform(x), transpose=True), x, atol=1e-5)
    assert np.abs(hadamard_transform(hadamard_transform(x)) - x).max() > 0.1


@pytest.mark.parametrize("size", LARGE)
def test_widths_of_released_models(size):
    x = jax.random.normal(jax.random.key(1), (2, size))
    y = hadamard_transform(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-4)
    np.testing.assert_allclose(hadamard_transform(y, transpose=True), x, atol=1e-4)


@pytest.mark.parametrize("size", [0, 3, 6, 9, 18, 23])
def test_a_size_without_a_matrix_is_named(size):
    assert not has_hadamard(size)
    with pytest.raises(InputError, match=f"size {size}:"):
        hadamard(size)


def test_one_outlier_is_spread_over_all_channels():
    # One channel at 50 among unit normals: about 50 / sqrt(64) + rest is left, and the rest is a few.
    x = jax.random.normal(jax.random.key(2), (64, 64)).at[:, 5].set(50.0)
    before, after = (np.abs(np.asarray(a)).max(axis=1) for a in (x, hadamard_transform(x)))
    np.testing.assert_allclose(before, 50.0)
    assert (after >= 50 / 8 - 1e-3).all()
    assert after.mean() < 50 / 8 + 3
    assert after.max() < 50 / 8 + 5


def test_dtype_is_kept_and_sums_are_float32():
    x = jax.random.normal(jax.random.key(3), (4, 576), jnp.bfloat16)
    y = hadamard_transform(x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), hadamard_transform(x.astype(jnp.float32)), rtol=2**-8, atol=1e-6)
