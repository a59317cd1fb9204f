"""Ops choose between a kernel and XLA, and both mean the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from qwix import QArray

from jaxinfer.cache.quantized import quantize
from jaxinfer.ops.attention import Scaled, attention
from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.einsum_integer import einsum_int4_int8, einsum_int8
from jaxinfer.ops.implementation import choose
from jaxinfer.ops.kernel_attention import kernel_attention
from jaxinfer.ops.kernel_einsum import kernel_product, worth
from jaxinfer.ops.online_attention import online_attention
from jaxinfer.passes.quantization.rounding import round_to_nearest
from pallas_kernels import chips

DECODE = {"slots": 128, "heads": 2, "buffers": 2, "splits": 1}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def refuse(*_):
    raise NotImplementedError("too odd")


def test_what_is_named_is_run_or_says_why_not():
    x = jnp.ones(2)
    assert choose("xla", refuse, jnp.sum, x) == 2
    with pytest.raises(NotImplementedError, match="the kernels are for TPUs and Hopper GPUs, and the target is 'cpu'"):
        choose("pallas", jnp.sum, jnp.sum, x)
    with pytest.raises(ValueError, match="implementation='mosaic': must be"):
        choose("mosaic", jnp.sum, jnp.sum, x)
    with chips.assume("v5e"):
        assert choose("pallas", jnp.sum, refuse, x) == 2
        with pytest.raises(NotImplementedError, match="too odd"):
            choose("pallas", refuse, jnp.sum, x)


def test_unnamed_the_kernel_is_for_tpus_and_xla_for_the_rest():
    x = jnp.ones(2)
    assert choose(None, refuse, jnp.sum, x) == 2
    with chips.assume("v5e"):
        assert choose(None, refuse, jnp.sum, x) == 2  # the kernel can't do it
        assert choose(None, lambda x: x.sum() + 1, jnp.sum, x) == 2  # this runs on a CPU after all
        text = (
            jax.jit(lambda x: choose(None, lambda x: x.sum() + 41, jnp.sum, x))
            .trace(x)
            .lower(lowering_platforms=("tpu",))
        )
        assert "4.1" in text.as_text()


def test_the_chip_that_is_assumed_is_part_of_what_is_compiled():
    """A function that was traced for a TPU is traced again for what is there."""
    seen = []
    f = jax.jit(lambda x: seen.append(chips.target()) or x)
    f(1.0)
    with chips.assume("v6e"):
        f(1.0)
        assert chips.current() is chips.CHIPS["v6e"]
    f(1.0)
    assert seen == [None, chips.CHIPS["v6e"]]
    assert chips.current() is chips.CHIPS["v5e"]  # for interpreters


def test_a_kernel_is_not_divided_over_a_mesh_by_itself():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    refused = pytest.raises(NotImplementedError, match=r"mesh axes data by itself; call it under jax\.shard_map")
    with chips.assume("v5e"), jax.sharding.use_abstract_mesh(mesh), refused:
        choose("pallas", jnp.sum, jnp.sum, jnp.ones(2))


@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, 3.0)])
def test_attention_means_the_same(T, window, softcap):
    B, N, K, S, H = 3, 4, 2, 256, 64
    q, k, v = draw(0, B, T, N, H), draw(1, B, K, S, H), draw(2, B, K, S, H)
    counts = np.array([T, max(1, T - 3), 0])
    positions = np.array([200, 0, 17])[:, None] + np.arange(T)
    positions = jnp.asarray(np.where(np.arange(T) < counts[:, None], positions, -1), jnp.int32)
    options = dict(scale=0.2, window=window, softcap=softcap)
    blocks = DECODE if T <= 8 else {"queries": 32, "slots": 128, "rows": 16, "buffers": 2}
    found = kernel_attention(q, k, v, positions, blocks=blocks, interpret=True, **options)
    expected = attention(q, k, v, positions, implementation="xla", **options)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[positions >= 0], expected[positions >= 0], atol=3e-6)


@pytest.mark.parametrize("qtype", ["int8", "float8_e4m3fn"])
def test_attention_over_codes_means_the_same(qtype):
    q, positions = draw(0, 2, 1, 4, 128), jnp.array([[200], [3]])
    k, v = (quantize(draw(seed, 2, 2, 256, 128), qtype) for seed in (1, 2))
    options = dict(scale=0.2, window=None, softcap=None)
    found = kernel_attention(
        q, k.values, v.values, positions, k_scale=k.scale, v_scale=v.scale, blocks=DECODE, interpret=True, **options
    )
    expected = online_attention(q, Scaled(*k), Scaled(*v), positions, implementation="xla", **options)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.parametrize(("qtype", "group"), [("int8", None), ("int8", 64), ("int4", 64), ("uint4", 32)])
def test_quantized_products_mean_the_same(qtype, group):
    x, weight = draw(0, 2, 3, 128), draw(1, 4, 24, 128)
    kernel = round_to_nearest(weight, 1, qtype, group)
    blocks = {"rows": 64, "outputs": 128, "copies": 2, "lanes": 128}
    found = kernel_product(x.reshape(6, 128), kernel, first=False, blocks=blocks, interpret=True)
    expected = einsum("btd,nhd->btnh", x, kernel, implementation="xla")
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-5)


def test_products_that_the_kernel_does_not_read():
    x, weight = draw(0, 1, 1, 64), draw(1, 64, 24)
    turned = QArray(jnp.ones((64, 24), jnp.int8), jnp.ones((1, 24)))
    with chips.assume("v5e"):
        with pytest.raises(NotImplementedError, match="inputs first"):
            einsum("btd,df->btf", x, turned, implementation="pallas")
        with pytest.raises(NotImplementedError, match="a product with a float kernel is XLA's"):
            einsum("btd,df->btf", x, weight, implementation="pallas")
        packed = round_to_nearest(draw(1, 24, 16), 1, "int4")
        with pytest.raises(NotImplementedError, match="packed rows of 16 entries"):
            einsum("btd,fd->btf", x[..., :16], packed, implementation="pallas")


def test_with_many_rows_xla_is_better_unless_the_kernel_is_named():
    int8, int4 = (round_to_nearest(draw(1, 24, 64), 1, qtype) for qtype in ("int8", "int4"))
    few, many, most = draw(0, 64, 64), draw(0, 65, 64), draw(0, 257, 64)
    assert [worth(None, x, int8) for x in (few, many)] == [None, "xla"]
    assert [worth(None, x, int4) for x in (many, most)] == [None, "xla"]
    assert worth("pallas", most, int8) == "pallas"
    fp8 = QArray(jnp.ones((24, 64), jnp.float8_e4m3fn), jnp.ones((24, 1)))
    assert worth(None, few, fp8) == "xla"


def test_integer_products_name_their_implementation_too():
    x = draw(0, 1, 1, 64)
    int8, int4 = (round_to_nearest(draw(1, 24, 64), 1, qtype) for qtype in ("int8", "int4"))
    for product, kernel in ((einsum_int8, int8), (einsum_int4_int8, int4)):
        with pytest.raises(NotImplementedError, match="implementation='pallas'"):
            product("btd,fd->btf", x, kernel, implementation="pallas")
        found = product("btd,fd->btf", x, kernel, implementation="xla")
        np.testing.assert_array_equal(found, product("btd,fd->btf", x, kernel))
