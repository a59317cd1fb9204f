"""Quantized leaves: packing, what they stand for, and the products that read them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import InputError
from jaxinfer.ops import quantized
from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.einsum_integer import einsum_int4_int8, einsum_int8, quantize_rows
from jaxinfer.ops.quantized import Packed, codes, dequantize, nbytes, pack, take_rows, unpack
from jaxinfer.passes.quantization.rounding import decode, encode, fit_group, leaf, round_to_nearest, scales

KINDS = ["int8", "int4", "uint4", "nf4", "float8_e4m3fn", "float8_e5m2"]
SHAPES = {  # einsum, kernel outputs first, input axes, x
    "matrix": ("btd,fd->btf", (24, 64), 1, (2, 3, 64)),
    "heads out": ("btd,nhd->btnh", (4, 6, 64), 1, (1, 1, 64)),
    "heads in": ("btnh,dnh->btd", (20, 4, 16), 2, (2, 5, 4, 16)),
}


def draw(shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@given(st.integers(1, 5), st.sampled_from([2, 6, 30, 32, 64, 96]))
def test_packing_is_undone_by_unpacking(rows, last):
    nibbles = np.random.default_rng(rows * last).integers(0, 16, (rows, last))
    packed = pack(jnp.asarray(nibbles, jnp.uint8))
    assert packed.shape == (rows, last // 2) and packed.dtype == jnp.uint8
    np.testing.assert_array_equal(unpack(packed), nibbles)
    signed = np.where(nibbles < 8, nibbles, nibbles - 16).astype(np.int8)
    np.testing.assert_array_equal(pack(jnp.asarray(signed)), packed)


def test_the_order_in_a_run_is_that_of_a_gguf_block():
    packed = pack(jnp.arange(64, dtype=jnp.uint8) % 16)
    assert packed[1] == 1 | (1 << 4) and packed[17] == 1 | (1 << 4)  # entries 1 and 17; then 33 and 49
    packed = pack(jnp.asarray([1, 2, 3, 4, 5, 6], jnp.uint8))  # no run of 32: the halves of the axis
    assert packed.tolist() == [1 | 4 << 4, 2 | 5 << 4, 3 | 6 << 4]
    with pytest.raises(ValueError, match="a last axis of 3"):
        pack(jnp.zeros((2, 3), jnp.uint8))


@pytest.mark.parametrize("qtype", KINDS)
@pytest.mark.parametrize("group", [None, 16])
def test_weights_on_the_grid_are_unchanged(qtype, group):
    once = dequantize(round_to_nearest(draw((6, 64)), 1, qtype, group))
    again = round_to_nearest(once, 1, qtype, group)
    np.testing.assert_allclose(dequantize(again), once, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("qtype", ["int8", "int4", "uint4"])
def test_an_error_is_at_most_half_a_step(qtype):
    w = draw((8, 64)) * jnp.logspace(-3, 2, 8)[:, None]
    q = round_to_nearest(w, 1, qtype, 16)
    error = jnp.abs(dequantize(q) - w).reshape(8, 4, 16).max(axis=-1)
    assert (error <= 0.5001 * q.scale + 1e-7).all()
    assert (error > 0.1 * q.scale).any()


def test_a_clip_search_never_rounds_worse():
    w = draw((16, 64)) ** 3  # heavy tails
    for qtype in KINDS:
        plain, searched = (dequantize(round_to_nearest(w, 1, qtype, 32, clip)) for clip in (False, True))
        before, after = (jnp.square(x - w).reshape(16, 2, 32).sum(-1) for x in (plain, searched))
        assert (after <= before * 1.0001 + 1e-9).all()
        if qtype in ("int4", "uint4", "nf4"):
            assert after.sum() < 0.98 * before.sum()


def test_the_scales_are_those_of_the_definitions():
    w = jnp.asarray([[1.0, -3.5, 2.0, 0.5, 0.0, 1.5, 3.0, 2.0]])
    assert scales(w, "int4", 4)[0].tolist() == [[0.5, pytest.approx(3 / 7)]]
    assert scales(w, "int8", 8)[0].tolist() == [[pytest.approx(3.5 / 127)]]
    scale, offset = scales(w, "uint4", 4)
    assert scale.tolist() == [[pytest.approx(5.5 / 15), pytest.approx(3 / 15)]]
    assert offset.tolist() == [[pytest.approx(-3.5, abs=1e-6), pytest.approx(0, abs=1e-6)]]
    assert scales(jnp.zeros((1, 4)), "int8", 4)[0] > 0  # zeros divide by something


@pytest.mark.parametrize("qtype", ["int8", "int4"])
def test_codes_agree_with_qwix_on_the_same_scale(qtype):
    w = draw((6, 64))
    bound = {"int8": 127, "int4": 7}[qtype]
    theirs = qwix.quantize(
        w, jnp.dtype(qtype), channelwise_axes=(0,), tiled_axes={1: 16}, calibration_method=f"absmax,{1 + 0.5 / bound}"
    )
    ours = round_to_nearest(w, 1, qtype, 16)
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=1e-6)
    np.testing.assert_array_equal(codes(ours), theirs.qvalue.astype(jnp.int8))
    np.testing.assert_allclose(dequantize(ours), qwix.dequantize(theirs), rtol=1e-5, atol=1e-7)


def test_nf4_agrees_with_qwix():
    w = draw((6, 64))
    theirs = qwix.quantize(w, "nf4", channelwise_axes=(0,), tiled_axes={1: 16})
    np.testing.assert_allclose(dequantize(round_to_nearest(w, 1, "nf4", 16)), qwix.dequantize(theirs), atol=1e-6)


def test_a_qarray_of_qwix_is_a_leaf_too():
    w = draw((24, 64))
    q = qwix.quantize(w, jnp.int8, channelwise_axes=(0,))
    x = draw((2, 3, 64), 1)
    np.testing.assert_allclose(einsum("btd,fd->btf", x, q), x @ qwix.dequantize(q).T, rtol=1e-4, atol=1e-4)
    asymmetric = qwix.quantize(w, jnp.int8, channelwise_axes=(0,), calibration_method="minmax")
    with pytest.raises(ValueError, match="zero point"):
        dequantize(asymmetric)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("qtype", KINDS)
@pytest.mark.parametrize("group", [None, 8, 32])
def test_a_product_is_that_of_the_weight_it_stands_for(shape, qtype, group):
    eq, kernel, inputs, x_shape = SHAPES[shape]
    q = round_to_nearest(draw(kernel), inputs, qtype, group)
    assert q.shape == kernel and q.ndim == len(kernel)
    assert not isinstance(q, Packed) or q.size == np.prod(kernel)
    x = draw(x_shape, 1)
    expected = jnp.einsum(eq, x, dequantize(q), precision="highest")
    np.testing.assert_allclose(jax.jit(einsum, static_argnums=0)(eq, x, q), expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_leaf_stands_for_its_own_dtype(dtype):
    for qtype in KINDS:
        q = round_to_nearest(draw((4, 64)).astype(dtype), 1, qtype, 32)
        assert q.dtype == dequantize(q).dtype == dtype
        assert einsum("btd,fd->btf", draw((1, 1, 64)).astype(dtype), q).dtype == dtype


def test_a_scale_of_a_file_may_be_narrower_than_the_weight():
    q = Packed(
        pack(jnp.zeros((2, 32), jnp.uint8) + 3), jnp.ones((2, 1), jnp.float16), None, qtype="uint4", dtype=jnp.float32
    )
    assert dequantize(q).dtype == jnp.float32 and (dequantize(q) == 3).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_an_integer_product_is_exact(shape, rows):
    eq, kernel, inputs, x_shape = SHAPES[shape]
    x = draw((1, rows, *x_shape[2:]), 1)
    q = round_to_nearest(draw(kernel), inputs, "int8")
    flat = np.asarray(x, np.float64).reshape(rows, -1)
    scale = np.abs(flat).max(axis=1, keepdims=True) / 127
    sums = np.round(np.float32(flat / scale)) @ np.asarray(codes(q), np.int64).reshape(-1, flat.shape[1]).T
    expected = sums * scale * np.asarray(q.scale).reshape(1, -1)
    out = jax.jit(einsum_int8, static_argnums=0)(eq, x, q)
    np.testing.assert_allclose(np.asarray(out).reshape(rows, -1), expected, rtol=1e-5, atol=1e-5)


def test_an_integer_product_agrees_with_qwix():
    x, w = draw((1, 4, 64), 1), draw((24, 64))
    q = round_to_nearest(w, 1, "int8")
    activations = qwix.quantize(x[0], jnp.int8, channelwise_axes=(0,), calibration_method=f"absmax,{127.5 / 127}")
    theirs = qwix.dot_general(activations, q, (((1,), (1,)), ((), ())))
    np.testing.assert_allclose(einsum_int8("btd,fd->btf", x, q)[0], theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qtype", ["int4", "uint4"])
@pytest.mark.parametrize(("rows", "group"), [(1, 32), (3, 64), (40, 64), (2, 96)], ids=str)
def test_an_int4_by_int8_product_is_that_of_the_rounded_parts(qtype, rows, group):
    """By machine code, with more rows than it takes, and with groups that it does not take."""
    x, q = draw((1, rows, 192), 1), round_to_nearest(draw((20, 192)), 1, qtype, group)
    parts = np.asarray(x, np.float64).reshape(rows, 6, 32)
    scale = np.abs(parts).max(axis=2, keepdims=True) / 127
    expected = (np.round(np.float32(parts / scale)) * scale).reshape(rows, 192) @ np.asarray(
        dequantize(q), np.float64
    ).T
    out = jax.jit(einsum_int4_int8, static_argnums=0)("btd,fd->btf", x, q)
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=2e-4)
    assert np.abs(out[0] - x[0] @ dequantize(q).T).max() > 1e-3  # the activations were rounded


def test_an_int4_by_int8_product_of_anything_else_is_refused():
    for q in (round_to_nearest(jnp.ones((4, 64)), 1, "int8"), round_to_nearest(jnp.ones((4, 48)), 1, "int4", 16)):
        with pytest.raises(ValueError, match="needs a 4-bit kernel, outputs first"):
            einsum_int4_int8("btd,fd->btf", jnp.ones((1, 1, q.shape[1])), q)


@pytest.mark.parametrize("group", [16, 24, 64])
def test_groups_of_activations_keep_outliers_apart(group):
    """One large input rounds the others away, unless they are in other groups."""
    x = draw((1, 2, 192), 1).at[..., 5].set(1e3)
    q = round_to_nearest(draw((24, 192)), 1, "int8")
    exact = np.asarray(x[0], np.float64) @ np.asarray(dequantize(q), np.float64).T
    errors = [np.abs(einsum_int8("btd,fd->btf", x, q, g)[0] - exact).mean() for g in (None, group)]
    assert errors[1] < 0.6 * errors[0]
    with pytest.raises(ValueError, match="group=7: does not divide 192 inputs"):
        einsum_int8("btd,fd->btf", x, q, 7)


def test_a_row_of_zeros_is_rounded_to_zeros():
    values, scale = quantize_rows(jnp.zeros((2, 8)))
    assert (values == 0).all() and (scale > 0).all()


@pytest.mark.parametrize(
    ("eq", "kernel"),
    [
        ("btd,df->btf", round_to_nearest(jnp.ones((64, 64)), 1, "int8")),
        ("btd,fd->btf", round_to_nearest(jnp.ones((24, 64)), 1, "int4", 32)),
        ("btd,fd->btf", round_to_nearest(jnp.ones((24, 64)), 1, "int8", 32)),
    ],
    ids=["inputs first", "int4", "groups"],
)
def test_an_integer_product_of_anything_else_is_refused(eq, kernel):
    with pytest.raises(ValueError, match="int8 kernel, outputs first, with one scale"):
        einsum_int8(eq, jnp.ones((1, 1, 64)), kernel)


def test_rows_of_a_table_are_read_alone():
    table = round_to_nearest(draw((50, 32)), 1, "int8")
    index = jnp.asarray([[3, 49], [0, 3]])
    np.testing.assert_array_equal(take_rows(table, index), dequantize(table)[index])
    four = round_to_nearest(draw((50, 64)), 1, "uint4", 32)
    np.testing.assert_array_equal(take_rows(four, index), dequantize(four)[index])
    text = jax.jit(take_rows).lower(table, index).compile().as_text()
    assert "f32[50,32]" not in text  # the table itself is never made float
    with pytest.raises(ValueError, match="share a scale"):
        take_rows(jax.tree.map(lambda x: x, quantized.QArray(table.qvalue, table.scale[:1])), index)


def test_bytes_are_those_of_the_buffers():
    w = draw((64, 128))
    assert nbytes(w) == 4 * 64 * 128
    assert nbytes(round_to_nearest(w, 1, "int8")) == 64 * 128 + 4 * 64
    assert nbytes(round_to_nearest(w, 1, "int4", 64)) == 64 * 128 // 2 + 4 * 64 * 2
    assert nbytes(jax.eval_shape(lambda w: round_to_nearest(w, 1, "uint4", 32), w)) == 64 * 64 + 2 * 4 * 64 * 4


def test_a_group_that_does_not_divide_is_fitted():
    assert fit_group(64, (8, 128), 1, "x") == 64
    assert fit_group(64, (8, 172), 1, "x") == 43
    assert fit_group(128, (8, 96), 1, "x") == 96
    assert fit_group(64, (8, 9, 64), 2, "x") == 64
    assert fit_group(128, (8, 9, 64), 2, "x") == 64  # two heads would leave one over
    assert fit_group(128, (8, 8, 64), 2, "x") == 128
    assert fit_group(4, (8, 64), 1, "x") == 4
    with pytest.raises(InputError, match="group=1: nothing near it divides the 64 inputs of x"):
        fit_group(1, (8, 64), 1, "x")
    with pytest.raises(
        InputError, match=r"group=64: nothing near it divides the 194 inputs of a\.b; sizes that do: 97, 194"
    ):
        fit_group(64, (8, 194), 1, "a.b")


def test_leaf_undoes_nothing():
    """Codes and scales go in flattened and come out as the weight."""
    w = draw((5, 4, 16))
    flat = w.reshape(5, 64)
    scale, offset = scales(flat, "uint4", 32)
    stored = leaf(encode(flat, scale, offset, "uint4"), scale, offset, "uint4", w.shape, 2, w.dtype)
    expected = decode(encode(flat, scale, offset, "uint4"), scale, offset, "uint4").reshape(w.shape)
    np.testing.assert_allclose(dequantize(stored), expected, rtol=1e-6, atol=1e-6)
    assert stored.scale.shape == (5, 2, 1)
