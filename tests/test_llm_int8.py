"""LLM.int8(): full precision at one end, plain w8a8 at the other, and what lies between."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import logits, lost, random_text, uneven_program
from models import tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.ops.quantized import nbytes
from jaxinfer.passes.quantization.llm_int8 import LLMInt8, OutlierExperts, OutlierLinear, split
from jaxinfer.passes.quantization.nodes import DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.w8a8 import W8A8
from jaxinfer.tree import select

MODELS = {
    "separate": ((), {}),
    "fused": (("fused", "long_last"), {"qkv_bias": True, "mlp_bias": True}),
    "experts": (("fused",), {"moe": tiny_moe()}),
}
INF = float("inf")


@pytest.fixture(scope="module", params=MODELS)
def program(request):
    layouts, config = MODELS[request.param]
    return uneven_program(layouts, spread=2.0, **config)


@pytest.fixture(scope="module")
def calibration(program):
    return random_text(program)


def test_split_takes_features_out():
    x = jnp.arange(1.0, 11.0).reshape(2, 5)
    few, rest = split(x, jnp.array([1, 3, 5]))
    np.testing.assert_array_equal(few, [[2, 4, 0], [7, 9, 0]])  # 5 is past the last: a place that is not used
    np.testing.assert_array_equal(rest, [[1, 0, 3, 0, 5], [6, 0, 8, 0, 10]])


def test_at_threshold_zero_it_is_full_precision(program, calibration):
    exact = logits(program, calibration.tokens)
    done = LLMInt8(threshold=0.0, features=None, embedding=False, calibration=calibration)(program)
    assert not any(jnp.any(n.kernel.qvalue) for n in select(done.model, (OutlierLinear, OutlierExperts)).values())
    np.testing.assert_allclose(logits(done, calibration.tokens), exact, atol=1e-5 * np.abs(exact).max())


def test_above_every_activation_it_is_w8a8(program, calibration):
    done, plain = LLMInt8(threshold=INF, calibration=calibration)(program), W8A8()(program)
    like = select(plain.model, (DynamicLinear, DynamicExperts))
    nodes = select(done.model, (OutlierLinear, OutlierExperts))
    assert nodes.keys() == like.keys()
    for path, node in nodes.items():
        inputs = node.kernel.shape[node.outliers.ndim - 1 :]
        assert (node.columns == np.prod(inputs)).all()  # no feature is kept
        np.testing.assert_array_equal(node.kernel.qvalue, like[path].kernel.qvalue)
        if isinstance(node, OutlierLinear):  # one layer: in a model, an activation on an edge may be rounded either way
            x = jax.random.normal(jax.random.key(0), (2, 3, *inputs))
            np.testing.assert_allclose(node(x), like[path](x), rtol=1e-6)
        else:
            x, sizes = jax.random.normal(jax.random.key(0), (9, *inputs)), jnp.array([4, 0, 3, 2])
            np.testing.assert_allclose(node(x, sizes), like[path](x, sizes), rtol=1e-6)


def test_more_features_in_full_precision_lose_less(program, calibration):
    exact = logits(program, calibration.tokens)
    few, more, most = (
        lost(
            LLMInt8(threshold=0.0, features=k, embedding=False, calibration=calibration)(program),
            exact,
            calibration.tokens,
        )
        for k in (1, 8, 24)
    )
    plain = lost(W8A8(embedding=False)(program), exact, calibration.tokens)
    assert 0 < most < more < few < plain and most < 0.5 * plain


def test_the_features_kept_are_the_largest_that_reach_the_threshold():
    program = uneven_program(places=("qkv",), spread=2.0)
    text = random_text(program)
    seen = {}

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Watch(LLMInt8):
        def visit(self, block, stats):
            jax.debug.callback(
                lambda s: seen.setdefault("absmax", np.asarray(s)), stats["attention.qkv.linear"]["absmax"]
            )
            return super().visit(block, stats)

    done = Watch(threshold=6.0, features=3, calibration=text)(program)
    jax.effects_barrier()
    node = done.model.layers[0].attention.qkv.linear
    order = np.argsort(-seen["absmax"])[:3]
    expected = sorted(i if seen["absmax"][i] >= 6.0 else 32 for i in order)
    assert node.columns.tolist() == expected and min(expected) < 32
    used = node.columns[node.columns < 32]
    kernel = np.moveaxis(np.asarray(program.model.layers[0].attention.qkv.linear.kernel), 0, -1)  # outputs first
    np.testing.assert_array_equal(node.outliers[..., : len(used)], kernel[..., used])
    assert not np.asarray(node.kernel.qvalue)[..., used].any()


def test_bytes_are_those_of_int8_and_of_the_columns():
    program = uneven_program()
    text = random_text(program)
    done = LLMInt8(features=2, embedding=False, calibration=text)(program)
    for path, node in select(done.model, OutlierLinear).items():
        outputs = int(np.prod(node.outliers.shape[:-1]))
        inputs = int(np.prod(node.kernel.shape)) // outputs
        assert nbytes([node.kernel, node.outliers, node.columns]) == outputs * (inputs + 4 + 2 * 4) + 2 * 4, path


def test_tokens_do_not_depend_on_their_neighbours():
    program = uneven_program(spread=2.0)
    text = random_text(program)
    done = LLMInt8(threshold=1.0, calibration=text)(program)
    together, alone = logits(done, text.tokens[:4]), logits(done, text.tokens[2:3])
    np.testing.assert_allclose(together[2:3], alone, rtol=1e-4, atol=1e-4)


def test_misuse_is_named():
    program = uneven_program()
    for options, message in [
        (dict(threshold=-1.0), "threshold=-1.0: must be 0"),
        (dict(features=0), "features=0: must"),
    ]:
        with pytest.raises(InputError, match=message):
            LLMInt8(**options, calibration=random_text(program))(program)
