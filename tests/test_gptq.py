"""GPTQ: the identities of its rounding, its bound, what it saves on average, and the pass around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import logits, lost, random_text, uneven_program
from models import random_program, tiny_config, tiny_moe
from qwix._src.core import qarray
from qwix.contrib import gptq_core

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import dequantize
from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.quantization.gptq import GPTQ, gptq
from jaxinfer.passes.quantization.gptq_rounding import gptq_codes
from jaxinfer.passes.quantization.int4 import Int4
from jaxinfer.passes.quantization.rounding import decode, encode, round_to_nearest, scales
from jaxinfer.tree import select

ANY = (-127, 127)  # so wide that nothing clips
INT4 = (-7, 7)


def weights(outputs=40, inputs=48, seed=0):
    return jax.random.normal(jax.random.key(seed), (outputs, inputs))


def moments(inputs=48, tokens=400, seed=1, mix=1.0):
    """Return E[x x^T] of inputs that are correlated more, the larger `mix`."""
    key = jax.random.key(seed)
    x = jax.random.normal(key, (tokens, inputs))
    x = x + mix * x @ jax.random.normal(jax.random.fold_in(key, 1), (inputs, inputs)) / inputs**0.5
    return x.T @ x / tokens


def grid(w, qtype="int4", group=16):
    return scales(w, qtype, group)


def loss(w, rounded, hessian):
    """Return each row's d H d^T, in float64."""
    d = np.asarray(w, np.float64) - np.asarray(rounded, np.float64)
    return ((d @ np.asarray(hessian, np.float64)) * d).sum(axis=1)


def upper_factor(hessian):
    """Return U of H^-1 = U^T U in float64."""
    return np.linalg.cholesky(np.linalg.inv(np.asarray(hessian, np.float64))).T


@pytest.mark.parametrize("qtype, levels", [("int4", INT4), ("uint4", (0, 15))])
@pytest.mark.parametrize("act_order", [False, True])
def test_weights_on_the_grid_stay(qtype, levels, act_order):
    w = weights()
    scale, offset = grid(w, qtype)
    exact = encode(w, scale, offset, qtype)
    on_grid = decode(exact, scale, offset, qtype)
    codes = gptq_codes(on_grid, moments(), scale, offset, levels, act_order=act_order)
    np.testing.assert_array_equal(codes, exact)


@pytest.mark.parametrize("qtype, levels", [("int4", INT4), ("uint4", (0, 15))])
def test_uncorrelated_inputs_are_rounded_to_nearest(qtype, levels):
    w = weights()
    scale, offset = grid(w, qtype)
    diagonal = jnp.diag(jnp.exp(jax.random.normal(jax.random.key(2), (48,))))
    np.testing.assert_array_equal(gptq_codes(w, diagonal, scale, offset, levels), encode(w, scale, offset, qtype))


def test_loss_is_the_sum_of_squared_errors_and_within_its_bound():
    w, hessian = weights(), moments()
    scale, _ = grid(w)
    codes = gptq_codes(w, hessian, scale, None, ANY, damp=0.0, act_order=False)
    rounded = decode(codes, scale, None, "int4")
    # The errors in the order of the algorithm, replayed in float64 from what it decided.
    upper, step = upper_factor(hessian), np.repeat(np.asarray(scale, np.float64), 16, axis=1)
    left, squares = np.asarray(w, np.float64), 0.0
    for j in range(48):
        e = (left[:, j] - np.asarray(rounded, np.float64)[:, j]) / upper[j, j]
        left = left - e[:, None] * upper[j]
        squares = squares + e**2
    np.testing.assert_allclose(loss(w, rounded, hessian), squares, rtol=1e-4)
    bound = ((step / 2 / np.diag(upper)) ** 2).sum(axis=1)
    assert (squares <= bound * (1 + 1e-3)).all() and (squares > 0.05 * bound).all()


@pytest.mark.parametrize("mix", [0.1, 1.0, 10.0])
def test_the_mean_loss_is_below_that_of_rounding_to_nearest(mix):
    w, hessian = weights(400), moments(mix=mix)
    scale, _ = grid(w)
    nearest = loss(w, decode(encode(w, scale, None, "int4"), scale, None, "int4"), hessian).mean()
    plain, ordered = (
        loss(w, decode(gptq_codes(w, hessian, scale, None, INT4, act_order=a), scale, None, "int4"), hessian).mean()
        for a in (False, True)
    )
    assert plain < nearest and ordered < nearest


def test_order_of_activity_is_permuting_rounding_and_permuting_back():
    w = weights()
    spread = jnp.exp(jax.random.normal(jax.random.key(3), (48,)))
    hessian = moments() * spread * spread[:, None]
    scale, _ = grid(w)
    wide = jnp.repeat(scale, 16, axis=1)
    order = jnp.argsort(-jnp.diag(hessian))
    permuted = gptq_codes(w[:, order], hessian[order][:, order], wide[:, order], None, INT4, act_order=False)
    back = jnp.zeros_like(permuted).at[:, order].set(permuted)
    ordered = gptq_codes(w, hessian, scale, None, INT4, act_order=True)
    np.testing.assert_array_equal(ordered, back)
    assert (ordered != gptq_codes(w, hessian, scale, None, INT4, act_order=False)).any()


@pytest.mark.parametrize("block", [1, 5, 16, 47])
def test_the_block_size_changes_no_code(block):
    w, hessian = weights(), moments()
    scale, offset = grid(w, "uint4")
    whole = gptq_codes(w, hessian, scale, offset, (0, 15), block=48)
    np.testing.assert_array_equal(gptq_codes(w, hessian, scale, offset, (0, 15), block=block), whole)


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    w, hessian = weights(), moments()
    dead = jnp.arange(48) % 7 == 3
    hessian = jnp.where(dead | dead[:, None], 0.0, hessian)
    scale, _ = grid(w)
    nearest = encode(w, scale, None, "int4")
    codes = gptq_codes(w, hessian, scale, None, INT4)
    np.testing.assert_array_equal(codes[:, dead], nearest[:, dead])
    assert (codes != nearest).any()
    np.testing.assert_array_equal(gptq_codes(w, jnp.zeros((48, 48)), scale, None, INT4), nearest)


def test_fewer_tokens_than_inputs_are_enough():
    w, hessian = weights(), moments(tokens=8)
    scale, _ = grid(w)
    rounded = decode(gptq_codes(w, hessian, scale, None, INT4), scale, None, "int4")
    nearest = decode(encode(w, scale, None, "int4"), scale, None, "int4")
    assert loss(w, rounded, hessian).mean() < 0.5 * loss(w, nearest, hessian).mean()


def test_it_agrees_with_qwix_on_one_scale_an_output():
    w, hessian = weights(16, 32), moments(32)
    rule = qarray.HowToQuantize(qtype=jnp.int8, channelwise_axes=(0,), tiled_axes={}, calibration_method="absmax")
    theirs, _ = gptq_core.quantize_weight(w, hessian, rule, blocksize=8)
    scale = theirs.scale
    ours = gptq_codes(w, hessian, scale, None, (-128, 127), act_order=False)
    assert (np.asarray(ours) == np.asarray(theirs.qvalue)).mean() > 0.99


@pytest.fixture(scope="module", params=["separate", "fused", "experts"])
def program(request):
    config = {"moe": tiny_moe()} if request.param == "experts" else {"qkv_bias": True}
    return uneven_program(() if request.param == "separate" else ("fused", "long_last"), **config)


@pytest.fixture(scope="module")
def calibration(program):
    return random_text(program)


@pytest.mark.parametrize("clip, share", [(False, 1.0), (True, 0.8)])
def test_the_pass_loses_less_than_rounding_to_nearest_on_its_text(program, calibration, clip, share):
    exact = logits(program, calibration.tokens)
    done = GPTQ(group=8, clip=clip, embedding=False, calibration=calibration)(program)
    plain = Int4(group=8, embedding=False)(program)
    assert 0 < lost(done, exact, calibration.tokens) < share * lost(plain, exact, calibration.tokens)


def test_each_node_is_rounded_by_its_own_moments(program, calibration):
    done = GPTQ(group=8, calibration=calibration, embedding=False)(program)
    nodes = select(done.model, (Linear, Experts))
    quantized = {path for path, node in nodes.items() if not isinstance(node.kernel, jax.Array)}
    assert quantized == {path for path in nodes if not path.endswith("router")}
    some = GPTQ(group=8, calibration=calibration, where=r".*attention\..*", skip=r".*\.o", embedding=False)(program)
    changed = {path for path, n in select(some.model, (Linear, Experts)).items() if not isinstance(n.kernel, jax.Array)}
    assert changed == {path for path in quantized if ".qkv" in path}


def test_experts_are_rounded_one_by_one():
    w = jnp.stack([weights(24, 16, seed) for seed in range(3)])
    hessian = jnp.stack([moments(16, seed=seed) for seed in range(2)] + [jnp.zeros((16, 16))])
    together = dequantize(gptq(w, 1, hessian, group=8, clip=False))
    for e in range(2):
        np.testing.assert_array_equal(together[e], dequantize(gptq(w[e], 1, hessian[e], group=8, clip=False)))
    np.testing.assert_array_equal(together[2], dequantize(round_to_nearest(w[2], 1, "int4", 8)))


def test_misuse_is_named():
    program = random_program(tiny_config())
    calibration = Calibration.of(program, list(range(48)), window=24)
    for options, message in [
        (dict(damp=0.0), "damp=0.0: must be above 0"),
        (dict(where="mlp"), "matches no Linear or Experts"),
        (dict(group=1), "group=1"),
    ]:
        with pytest.raises(InputError, match=message):
            GPTQ(**options, calibration=calibration)(program)
