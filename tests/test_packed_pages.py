"""Packed groups in pages: attention over them is that over the same groups in rows, and on a TPU it is the kernel's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.cache import packed_attention
from jaxinfer.cache.groups import quantize_groups
from jaxinfer.cache.packed_pages import PackedPages
from pallas_kernels import chips

B, K, N, H, G, PAGE, M = 3, 2, 4, 128, 64, 128, 5
LENGTH = np.array([9 * G, 0, 2 * G])
RESIDUAL = 11


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def packed():
    """Return groups in rows, and the same in pages anywhere; what is not written, and what rows don't have, is NaN."""
    shape = (B, K, M * PAGE // G, G, H)
    groups = quantize_groups(draw(1, *shape), draw(2, *shape), 4)
    table = np.random.default_rng(3).permutation(B * M + 2)[: B * M].reshape(B, M)
    table = np.where(np.arange(M) * PAGE < LENGTH[:, None], table, 10**6)
    grids = groups.k_scale.dtype
    pages = PackedPages(
        jnp.full((B * M + 2, 2, K, PAGE // 2, H), 255, jnp.uint8),
        jnp.full((B * M + 2, 2, K, PAGE // G, H), jnp.nan, grids),
        jnp.full((B * M + 2, 2, groups.v_scale.shape[1], PAGE), jnp.nan, grids),
        jnp.asarray(table, jnp.int32),
    )
    return groups, jax.jit(PackedPages.write)(pages, groups, jnp.zeros(B, jnp.int32), jnp.asarray(LENGTH // G)), pages


def assert_same(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_groups_written_one_by_one_are_those_written_at_once():
    groups, expected, pages = packed()
    assert (pages.count, pages.size, pages.together, pages.bits, pages.kv_heads) == (M * PAGE // G, G, 2, 4, K)
    write = jax.jit(PackedPages.write_one)
    for row in range(B):
        for m in range(LENGTH[row] // G):
            own = jax.tree.map(lambda x, row=row: x[row : row + 1], groups.cut(jnp.int32(m), 1))
            pages = write(pages, own, jnp.int32(row), jnp.int32(m))
    assert_same(pages, expected)


def test_groups_past_the_table_are_dropped():
    groups, _, pages = packed()
    for first, counts in ((LENGTH * 0 + M * PAGE // G, LENGTH * 0 + 10), (LENGTH * 0, LENGTH * 0)):
        assert_same(pages.write(groups, jnp.asarray(first), jnp.asarray(counts)), pages)


def test_what_was_written_is_read():
    groups, pages, _ = packed()
    for index in ([0, 0, 1], [8, 0, 0]):
        found, expected = (x.of_rows(jnp.asarray(index)) for x in (pages, groups))
        for row in (0, 2):
            assert_same(*(jax.tree.map(lambda x, row=row: x[row], one) for one in (found, expected)))
    first = [jax.tree.map(lambda x: x[0], one) for one in (pages.cut(jnp.int32(2), 6), groups.cut(jnp.int32(2), 6))]
    assert_same(*first)


@pytest.mark.parametrize("way", ["xla", "kernel"])
@pytest.mark.parametrize(("T", "window", "softcap"), [(1, None, None), (8, 300, 2.0), (90, None, None)])
def test_attention_over_pages_is_that_over_rows(monkeypatch, way, T, window, softcap):
    """Also where the row's last group is packed for its later queries only."""
    for name, blocks in (
        ("paged_kivi_attention", {"slots": 256, "heads": 2, "buffers": 2, "splits": 1}),
        ("kivi_prefill_attention", {"queries": 48, "slots": 128, "rows": 48, "buffers": 2}),
    ):
        module = getattr(packed_attention, name)
        monkeypatch.setattr(module, "tpu", functools.partial(module.tpu, interpret=True, blocks=blocks))
    groups, pages, _ = packed()
    q = draw(4, B, T, N, H)
    start = np.maximum(LENGTH + 7 - (64 if T > 8 else 0), 0)[:, None]
    positions = start + np.arange(T)
    positions = jnp.asarray(np.where(positions < LENGTH[:, None] + G + RESIDUAL - 1, positions, -1), jnp.int32)
    options = dict(residual=RESIDUAL, scale=0.2, window=window, softcap=softcap)
    kernel = functools.partial(packed_attention._by_kernel, consecutive=True)
    attend = jax.jit(functools.partial({"xla": packed_attention._by_blocks, "kernel": kernel}[way], **options))
    parts = attend(q, pages, positions), packed_attention._by_blocks(q, groups, positions, **options)
    found, expected = (np.asarray(out * np.exp(lse - 3)[..., None]) for out, lse in parts)
    assert np.abs(expected[[0, 2]]).max() > 0.01 and not expected[1].any()
    real = np.asarray(positions) >= 0
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_kernel_is_taken_for_a_tpu():
    _, pages, _ = packed()
    options = dict(residual=RESIDUAL, scale=0.1, window=None, softcap=None)
    attend = functools.partial(packed_attention.packed_attention, **options)
    with chips.assume("v5e"):
        for T, name in ((1, "paged_kivi_attention"), (9, "kivi_prefill_attention")):
            positions = jnp.asarray(LENGTH[:, None] + np.arange(T), jnp.int32)
            assert f"name={name}" in str(jax.jit(attend).trace(draw(4, B, T, N, H), pages, positions).jaxpr)
