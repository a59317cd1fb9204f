"""The GPU's decode attention with no GPU: interpreted beside its reference, and lowered as it stands."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_interpreter import interpreter
from kernel_cases import case_of

from pallas_kernels import decode_attention, gpus
from pallas_kernels.decode_attention.cases import BRANCHING, case
from pallas_kernels.kernels import kernel
from pallas_kernels.paged_decode_attention.cases import case as paged_case
from pallas_kernels.tolerance import BOUNDS, relative_error

F32, I8 = jnp.float32, jnp.int8
CASES = {
    "decode_attention": [
        case("window", 2, 4, 1, 2, 136, 64, [1, 136], position=[-3, 130], window=40, sinks=4, return_lse=True),
        case("starts", 2, 2, 1, 4, 136, 64, [130, 40], start=[60, 40], gpu_blocks={"splits": 3}, return_lse=True),
        case("tree", 1, 8, 1, 2, 128, 64, [124], tree=BRANCHING, window=20),
        case("int8", 1, 2, 1, 4, 128, 64, [70], cache=I8, softcap=5.0, gpu_blocks={"splits": 2, "stages": 2}),
        case("ring", 5, 1, 1, 4, 136, 64, [100, 136, 999, 600, 0], start=[0, 64, 900, 464, 0], ring=True,
             return_lse=True),
        case("ring_t3", 3, 3, 1, 2, 136, 64, [100, 700, 137], start=[40, 590, -5], ring=True, return_lse=True,
             gpu_blocks={"splits": 2}),
        case("ring_window", 3, 4, 1, 2, 192, 64, [500, 90, 191], window=40, position=[496, 80, 187], softcap=5.0,
             ring=True),
    ],
    "paged_decode_attention": [
        paged_case("pages", 2, 2, 1, 4, 16, 64, [70, 0], window=30, return_lse=True, append=False),
        paged_case("int8", 1, 1, 1, 8, 16, 64, [70], cache=I8, gpu_blocks={"splits": 2}, append=False),
        paged_case("long_pages", 1, 1, 1, 8, 128, 64, [200]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), [(name, case.name) for name, cases in CASES.items() for case in cases])
def test_interpreted_it_is_its_reference(name, case):
    found, case = kernel(name), next(c for c in CASES[name] if c.name == case)
    inputs = case.inputs()
    spoiled = jax.tree.map(jnp.asarray, case.spoil(inputs))
    with interpreter() as interpret:
        ours = found.gpu(**spoiled, **case.options, blocks=case.gpu_blocks, interpret=interpret)
    expected = found.reference(**jax.tree.map(jnp.asarray, inputs), **case.options)
    if case.donated:
        ours, expected = ours[0], expected[0]
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other))
        assert relative_error(*(np.where(np.isneginf(x), 0, x) for x in (one, other))) <= BOUNDS["bfloat16"]


@pytest.mark.parametrize("window", [None, 30])
def test_a_ring_is_a_cache_of_its_newest_tokens(window):
    """To the reference, which the kernel is held to."""
    rng, (B, R, S) = np.random.default_rng(0), (4, 40, 200)
    q, k, v = (rng.standard_normal(x).astype(np.float32) for x in ((B, 2, 4, 16), (B, 2, S, 16), (B, 2, S, 16)))
    length = np.array([200, 25, 41, 80])
    start = np.maximum(length - R, [170, 3, 0, 0])
    rings = [np.full((B, 2, R, 16), np.nan, np.float32) for _ in "kv"]
    for b, x in np.ndindex(B, 2):
        for p in range(max(0, length[b] - R), length[b]):
            rings[x][b, :, p % R] = (k, v)[x][b, :, p]
    options = dict(scale=0.3, start=start, window=window, return_lse=True)
    found = decode_attention.reference(jnp.asarray(q), *map(jnp.asarray, rings), length, ring=True, **options)
    expected = decode_attention.reference(*map(jnp.asarray, (q, k, v)), length, **options)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-6)


LOWERED = [
    ("decode_attention", "ring_past_the_end"),
    ("decode_attention", "gqa_4_h96"),
    ("decode_attention", "splits"),
    ("decode_attention", "fp8"),
    ("decode_attention", "tree_window"),
    ("paged_decode_attention", "bf16"),
    ("paged_decode_attention", "int8"),
]


@pytest.mark.parametrize(("name", "case"), LOWERED)
def test_it_lowers(name, case):
    assert kernels_in(*case_of(name, case)) >= 1


@pytest.mark.parametrize(
    ("name", "case", "kernels"),
    [
        ("decode_attention", "cluster_of_16", 1),
        ("decode_attention", "cluster_int8", 1),
        ("decode_attention", "ring_cluster", 1),
        ("decode_attention", "gpu_splits", 2),
        ("paged_decode_attention", "cluster", 1),
    ],
)
def test_a_cluster_needs_no_kernel_to_merge_its_splits(name, case, kernels):
    found = kernel(name)
    assert kernels_in(found, next(c for c in found.gpu_tests if c.name == case)) == kernels


def kernels_in(found, case):
    """Return how many kernels a case becomes for an H100."""
    case = case.narrowed()
    with gpus.assume("h100"):
        traced = jax.jit(lambda x: found.gpu(**x, **case.options, blocks=case.gpu_blocks)).trace(dict(case.shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text().count("custom_call @mosaic_gpu")


def test_what_it_refuses():
    good = case("good", 1, 1, 1, 1, 64, 64, [64])
    shapes = good.shapes
    for name, shape in (
        ("q", jax.ShapeDtypeStruct((1, 1, 1, 64), F32)),
        ("k", jax.ShapeDtypeStruct((1, 1, 60, 64), jnp.bfloat16)),
        ("k", jax.ShapeDtypeStruct((1, 1, 64, 512), jnp.bfloat16)),
    ):
        with pytest.raises(NotImplementedError, match="on a GPU"):
            given = {**shapes, name: shape} if shape.shape[-1] == 64 else _wider(shapes, shape.shape[-1])
            jax.eval_shape(lambda x: decode_attention.gpu(**x, scale=1.0), given)
    tree = np.ones((1, 1), bool)
    for more in ({"sinks": 4}, {"tree": tree}):
        with pytest.raises(NotImplementedError, match="ring: must be without scales, a tree and sinks"):
            jax.eval_shape(lambda x, more=more: decode_attention.gpu(**x, scale=1.0, ring=True, **more), shapes)
    with pytest.raises(NotImplementedError, match="ring: must be a cache of all slots on a TPU"):
        jax.eval_shape(lambda x: decode_attention.tpu(**x, scale=1.0, ring=True), shapes)
    with pytest.raises(ValueError, match="position and tree"):
        jax.eval_shape(
            lambda x: decode_attention.gpu(**x, scale=1.0, tree=tree, position=np.zeros(1, np.int32)), shapes
        )


def _wider(shapes, H):
    return {
        name: x if isinstance(x, np.ndarray) else jax.ShapeDtypeStruct((*x.shape[:-1], H), x.dtype)
        for name, x in shapes.items()
    }


def test_splits_fill_the_processors():
    from pallas_kernels.decode_attention.gpu_rows import blocks_for

    chosen = functools.partial(blocks_for, width=128, columns=8, stored=jnp.bfloat16, scales=None)
    for groups, splits in ((32, 8), (128, 2), (512, 1)):
        assert chosen(groups, 8192, given={})["splits"] == splits
    assert chosen(8, 100, given={"stages": 2}) == {"slots": 64, "stages": 2, "splits": 1, "overlap": 1, "cluster": 0}


def test_splits_of_a_few_groups_are_a_cluster():
    from pallas_kernels.decode_attention.gpu_rows import blocks_for

    def chosen(groups, width=128, capacity=8192, **given):
        found = blocks_for(groups, capacity, width, 8, jnp.bfloat16, None, given)
        return found["splits"], found["cluster"], found["slots"]

    assert chosen(8) == chosen(16) == (8, 1, 128) and chosen(17) == (15, 0, 64) and chosen(8, 256) == (16, 0, 64)
    assert chosen(8, capacity=1000) == (4, 1, 128) and chosen(8, capacity=200) == (1, 1, 128)
    assert chosen(128, cluster=1) == (2, 1, 64) and chosen(8, slots=64, cluster=1) == (8, 1, 64)
    assert chosen(8, splits=16, cluster=1) == (16, 1, 64) and chosen(8, splits=3) == (3, 0, 64)
    with pytest.raises(ValueError, match="a cluster of 32 splits"):
        chosen(8, splits=32, cluster=1)
