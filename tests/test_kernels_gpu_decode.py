"""The GPU's decode attention with no GPU: interpreted beside its reference, and lowered as it stands."""

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
    ],
    "paged_decode_attention": [
        paged_case("pages", 2, 2, 1, 4, 16, 64, [70, 0], window=30, return_lse=True, append=False),
        paged_case("int8", 1, 1, 1, 8, 16, 64, [70], cache=I8, gpu_blocks={"splits": 2}, append=False),
        paged_case("long_pages", 1, 1, 1, 8, 128, 64, [200]),
    ],
}


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


LOWERED = [
    ("decode_attention", "gqa_4_h96"),
    ("decode_attention", "splits"),
    ("decode_attention", "fp8"),
    ("decode_attention", "tree_window"),
    ("paged_decode_attention", "bf16"),
    ("paged_decode_attention", "int8"),
]


@pytest.mark.parametrize(("name", "case"), LOWERED)
def test_it_lowers(name, case):
    found, case = case_of(name, case)
    case = case.narrowed()
    with gpus.assume("h100"):
        traced = jax.jit(lambda x: found.gpu(**x, **case.options, blocks=case.gpu_blocks)).trace(dict(case.shapes))
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


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

    for groups, splits in ((8, 33), (128, 2), (512, 1)):
        assert blocks_for(groups, 8192, 128, 8, jnp.bfloat16, None, {})["splits"] == splits
    assert blocks_for(8, 100, 128, 8, jnp.bfloat16, None, {"stages": 2}) == {
        "slots": 64, "stages": 2, "splits": 1, "overlap": 1,
    }  # fmt: skip
