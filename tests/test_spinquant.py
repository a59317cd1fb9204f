"""SpinQuant: Cayley steps stay among rotations and go downhill; the learned model is the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import stories_path
from models import random_program, tiny_config, tiny_moe

import jaxinfer.passes as passes
from jaxinfer import generate, load
from jaxinfer.errors import InputError
from jaxinfer.ops.hadamard import hadamard
from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.quantization.cayley import cayley_step
from jaxinfer.passes.quantization.spinquant import SpinQuant
from jaxinfer.passes.quantization.straight_through import cross_entropy, fake_quantize, round_straight_through

TOKENS = np.asarray(jax.random.randint(jax.random.key(0), (2, 24), 0, 96), np.int32)
TEXT = Calibration(TOKENS)
QUICK = SpinQuant(steps=1, calibration=TEXT)


@jax.jit
def logits_of(model):
    return model.logits(model(jnp.asarray(TOKENS), model.init_cache(2, 24))[0])


def assert_same_function(a, b, tolerance=1e-4):
    expected, found = logits_of(a.model), logits_of(b.model)
    assert np.abs(expected).max() > 0.5
    assert np.abs(expected - found).max() <= tolerance * np.abs(expected).max()


def test_a_rotation_stays_one_over_a_hundred_steps_and_finds_another():
    wanted = jnp.linalg.qr(jax.random.normal(jax.random.key(1), (48, 48)))[0]
    wanted = wanted.at[:, 0].mul(jnp.linalg.det(wanted))  # a rotation can't reach a reflection
    r = jnp.asarray(hadamard(48))
    r = r.at[:, 0].mul(jnp.linalg.det(r))
    loss = lambda r: jnp.square(r - wanted).sum()  # noqa: E731
    step = jax.jit(lambda r, rate: cayley_step(r, jax.grad(loss)(r), rate))
    losses = [loss(r)]
    for i in range(100):
        r = step(r, jnp.float32(0.3 * (1 - i / 100)))
        losses.append(loss(r))
    assert np.abs(r.T @ r - np.eye(48)).max() < 1e-5
    assert losses[-1] < 0.02 * losses[0]
    assert (np.diff(losses)[:20] < 0).all()


def test_a_stack_of_rotations_stays_orthogonal():
    r = jnp.broadcast_to(jnp.asarray(hadamard(16)), (3, 16, 16))
    for i in range(20):
        r = cayley_step(r, jax.random.normal(jax.random.key(i), r.shape), jnp.float32(0.5))
    np.testing.assert_allclose(np.swapaxes(r, 1, 2) @ r, np.broadcast_to(np.eye(16), r.shape), atol=1e-5)
    assert np.abs(r - hadamard(16)).max() > 0.1


def test_a_zero_gradient_is_the_identity():
    r = jnp.asarray(hadamard(24))
    np.testing.assert_allclose(cayley_step(r, jnp.zeros_like(r), jnp.float32(1.0)), r, atol=1e-7)


def test_rounding_has_a_grid_and_the_derivative_of_the_identity():
    x = jax.random.normal(jax.random.key(2), (3, 32))
    y = round_straight_through(x, 4)
    steps = y / (np.abs(x).max(axis=1, keepdims=True) / 7)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-5)
    assert np.abs(y - x).max() > 0.01
    np.testing.assert_array_equal(jax.grad(lambda x: round_straight_through(x, 4).sum())(x), 1)


def test_fake_quantization_at_many_bits_is_the_model_and_at_few_is_not():
    model = random_program(tiny_config(moe=tiny_moe(), tie_embeddings=False)).model
    tokens = jnp.asarray(TOKENS)
    exact = cross_entropy(model, tokens)
    np.testing.assert_allclose(cross_entropy(fake_quantize(model, 20, 8, 20), tokens), exact, rtol=1e-3)
    assert abs(cross_entropy(fake_quantize(model, 3, 8, 20), tokens) - exact) > 0.01
    assert abs(cross_entropy(fake_quantize(model, 20, 8, 3), tokens) - exact) > 0.01


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_embeddings=False, qkv_bias=True, out_bias=True, moe=tiny_moe()),
        dict(post_norms=True, qk_norm=True, mlp_bias=True),
    ],
    ids=["tied", "untied, experts", "post norms"],
)
def test_the_learned_model_is_the_same_function(changes):
    program = random_program(tiny_config(**changes))
    assert_same_function(program, QUICK(program))


@pytest.mark.optimized
def test_learning_lowers_the_loss_of_the_rounded_model():
    """On a model that was trained and its own text; the mean of eight starts, as one is a gamble (0.04 apart)."""
    program = load(stories_path())
    rows = [program.tokenizer.encode("Once upon a time")] * 4
    tokens = generate(program, rows, max_new_tokens=80, temperature=1.0, stop_ids=()).tokens
    gains = []
    for seed in range(8):
        spin = SpinQuant(steps=24, activation_bits=4, learning_rate=0.5, seed=seed, calibration=Calibration(tokens))
        start = spin._start(program.config)
        learned = spin._learn(program.model, start)
        loss = jax.jit(spin.loss)
        before, after = (np.mean([loss(r, program.model, t[None]) for t in tokens]) for r in (start, learned))
        gains.append(before - after)
        for r in jax.tree.leaves(learned):
            np.testing.assert_allclose(
                np.swapaxes(r, -1, -2) @ r, np.broadcast_to(np.eye(r.shape[-1]), r.shape), atol=1e-5
            )
    assert np.mean(gains) > 0.01, gains  # nats of about 1.5; 0.037 here


@pytest.mark.parametrize(
    "option", [dict(bits=3), dict(activation_bits=4), dict(group=16), dict(learning_rate=0.1), dict(seed=1)], ids=str
)
def test_every_option_of_the_learning_changes_what_is_learned(option):
    program = random_program(tiny_config(num_layers=1, windows=()))
    spin = dataclasses.replace(QUICK, steps=1)
    a, b = (s._learn(program.model, s._start(program.config)) for s in (spin, dataclasses.replace(spin, **option)))
    assert np.abs(a["residual"] - b["residual"]).max() > 1e-6


def test_all_off_is_the_baseline_itself():
    program = random_program(tiny_config())
    same = dataclasses.replace(QUICK, **SpinQuant.about.degenerate)(program)
    assert all(a is b for a, b in zip(jax.tree.leaves(program.model), jax.tree.leaves(same.model), strict=True))


def test_shapes_need_no_text_and_no_steps():
    program = random_program(tiny_config())
    abstract = program.replace(model=jax.eval_shape(lambda: program.model))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), SpinQuant()(abstract).model)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), QUICK(program).model)


def test_misuse_is_refused():
    program = random_program(tiny_config())
    with pytest.raises(InputError, match="needs text"):
        SpinQuant()(program)
    with pytest.raises(InputError, match="bits=1"):
        dataclasses.replace(QUICK, bits=1)(program)
    with pytest.raises(InputError, match="put it first"):
        passes.apply(program, "int8", "spinquant", calibration=TEXT)
