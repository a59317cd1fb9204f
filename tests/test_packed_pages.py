"""Packed groups in pages: attention over them is that over the same groups in rows, and on a TPU it is the kernel's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache import packed_pages
from jaxinfer.cache.groups import quantize_groups
from jaxinfer.cache.packed_attention import packed_attention
from jaxinfer.cache.packed_pages import PackedPages, paged_packed_attention
from pallas_kernels import chips

B, K, N, H, G, PAGE, M = 3, 2, 4, 128, 64, 128, 5
LENGTH = np.array([9 * G, 0, 2 * G])


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def packed():
    """Return groups in rows, and the same in pages anywhere, each written once it was complete; others hold NaN."""
    shape = (B, K, M * PAGE // G, G, H)
    groups = quantize_groups(draw(1, *shape), draw(2, *shape), 4)
    table = np.random.default_rng(3).permutation(B * M + 2)[: B * M].reshape(B, M).astype(np.int32)
    grids = groups.k_scale.dtype
    pages = PackedPages(
        jnp.full((B * M + 2, 2, K, PAGE // 2, H), 255, jnp.uint8),
        jnp.full((B * M + 2, 2, K, PAGE // G, H), jnp.nan, grids),
        jnp.full((B * M + 2, 2, groups.v_scale.shape[1], PAGE), jnp.nan, grids),
    )
    write = jax.jit(PackedPages.write)
    for m in range(LENGTH.max() // G):
        index = jnp.asarray(np.where(m * G < LENGTH, m, -1))
        pages = write(pages, groups.cut(jnp.int32(m), 1), jnp.asarray(table), index)
    dead = np.arange(M) * PAGE >= LENGTH[:, None]
    return groups, pages, jnp.asarray(np.where(dead, 10**6, table))


@pytest.mark.parametrize(("way", "T", "window"), [("xla", 1, None), ("xla", 3, 300), ("kernel", 2, None)])
def test_attention_over_pages_is_that_over_rows(monkeypatch, way, T, window):
    if way == "kernel":
        blocks = {"slots": 256, "heads": 2, "buffers": 2, "splits": 1}
        kernel = functools.partial(packed_pages.paged_kivi_attention.tpu, interpret=True, blocks=blocks)
        monkeypatch.setattr(packed_pages.paged_kivi_attention, "tpu", kernel)
    groups, pages, table = packed()
    q, position = draw(4, B, T, N, H), jnp.asarray(LENGTH + 10)
    options = dict(scale=0.2, window=window, softcap=None)
    attend = {"kernel": packed_pages._by_kernel, "xla": packed_pages._by_blocks}[way]
    found = jax.jit(functools.partial(attend, **options))(q, pages, table, jnp.asarray(LENGTH), position)
    positions = position[:, None] + jnp.arange(T)
    expected = packed_attention(q, groups, positions, residual=11, **options, implementation="xla")
    out, lse = (np.asarray(x)[[0, 2]] for x in found)
    np.testing.assert_allclose(lse, np.asarray(expected[1])[[0, 2]], atol=1e-5)
    np.testing.assert_allclose(out, np.asarray(expected[0])[[0, 2]], atol=1e-5)
    assert (np.asarray(found[1])[1] < -1e29).all()  # a row with nothing packed has no weight


def test_the_kernel_is_taken_for_a_tpu():
    _, pages, table = packed()
    attend = functools.partial(paged_packed_attention, scale=0.1)
    with chips.assume("v5e"):
        given = draw(4, B, 1, N, H), pages, table, jnp.asarray(LENGTH), jnp.asarray(LENGTH)
        assert "paged_kivi_attention" in str(jax.jit(attend).trace(*given).jaxpr)
        with pytest.raises(NotImplementedError, match="9 queries a row"):
            attend(draw(4, B, 9, N, H), *given[1:], implementation="pallas")
