"""SmoothQuant: the factors, the identity that they are without rounding, and what they save."""

import jax.numpy as jnp
import numpy as np
import pytest
from channels import logits, lost, random_text, uneven_program
from models import tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.rescaling import FOLDS
from jaxinfer.passes.quantization.smoothquant import SmoothQuant, smoothing_factors
from jaxinfer.passes.quantization.w8a8 import W8A8
from jaxinfer.tree import leaves, select

MODELS = {
    "separate": ((), {}),
    "fused": (("fused", "long_last"), {"qkv_bias": True, "mlp_bias": True, "tie_embeddings": False}),
    "experts": (("fused",), {"moe": tiny_moe()}),
}


@pytest.fixture(scope="module", params=MODELS)
def program(request):
    layouts, config = MODELS[request.param]
    return uneven_program(layouts, spread=2.0, **config)


@pytest.fixture(scope="module")
def calibration(program):
    return random_text(program)


def test_factors_split_the_range():
    x, w = jnp.array([4.0, 9.0, 0.0, 5.0]), jnp.array([1.0, 0.25, 2.0, 0.0])
    np.testing.assert_allclose(smoothing_factors(x, w, 0.5), [2.0, 6.0, 1.0, 1.0])
    s = smoothing_factors(x, w, 1.0)
    np.testing.assert_allclose((x / s)[:2], 1.0)  # all of the range has moved
    s = smoothing_factors(x, w, 0.0)
    np.testing.assert_allclose((w * s)[:2], 1.0)


def test_scaling_alone_is_the_identity_on_logits_and_evens_channels_out(program, calibration):
    tokens = calibration.tokens[:2]
    smooth = SmoothQuant(rounding=False, folds=FOLDS, calibration=calibration)(program)
    before = logits(program, tokens)
    np.testing.assert_allclose(logits(smooth, tokens), before, atol=1e-5 * np.abs(before).max())
    assert smooth.model.embed.table is program.model.embed.table
    gains = [np.log(np.abs(p.model.layers[0].attention_norm.scale)).std() for p in (program, smooth)]
    assert gains[1] < 0.7 * gains[0]


def test_it_loses_less_than_w8a8_where_channels_are_uneven(program, calibration):
    exact = logits(program, calibration.tokens)
    done = SmoothQuant(embedding=False, folds=FOLDS, calibration=calibration)(program)
    plain = W8A8(embedding=False)(program)
    assert 0 < lost(done, exact, calibration.tokens) < 0.5 * lost(plain, exact, calibration.tokens)


def test_the_products_are_of_integers(program, calibration):
    done = SmoothQuant(calibration=calibration)(program)
    like = W8A8()(program)
    kinds = (DynamicLinear, DynamicExperts, DynamicEmbedding)
    assert select(done.model, kinds).keys() == select(like.model, kinds).keys()
    assert {p: (x.shape, x.dtype) for p, x in leaves(done.model).items()} == {
        p: (x.shape, x.dtype) for p, x in leaves(like.model).items()
    }


def test_misuse_is_named():
    program = uneven_program()
    with pytest.raises(InputError, match=r"alpha=1.5: must be in 0\.\.1"):
        SmoothQuant(alpha=1.5, calibration=random_text(program))(program)
    with pytest.raises(InputError, match="did you mean 'down'"):
        SmoothQuant(folds=("dwon",), calibration=random_text(program))(program)
