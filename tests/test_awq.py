"""AWQ: its search against its own definition, the fold that is the identity, and what it saves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from channels import logits, lost, random_text, uneven_program
from models import tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.passes.quantization.awq import AWQ
from jaxinfer.passes.quantization.awq_search import nearest, search_factors, search_range
from jaxinfer.passes.quantization.int4 import Int4
from jaxinfer.passes.quantization.rounding import decode, encode, scales
from jaxinfer.tree import leaves

MODELS = {
    "separate": ((), {}),
    "fused": (("fused", "long_last"), {"qkv_bias": True, "mlp_bias": True}),
    "experts": (("fused",), {"moe": tiny_moe()}),
}


@pytest.fixture(scope="module", params=MODELS)
def program(request):
    layouts, config = MODELS[request.param]
    return uneven_program(layouts, **config)


@pytest.fixture(scope="module")
def calibration(program):
    return random_text(program)


def inputs(size=32, spread=2.0):
    """Return rows of inputs whose channels differ in size by factors of about e^spread."""
    key = jax.random.key(0)
    return jax.random.normal(key, (300, size)) * jnp.exp(
        spread * jax.random.normal(jax.random.fold_in(key, 1), (size,))
    )


def rounded(w, qtype="int4", group=8):
    grid = scales(w, qtype, group)
    return decode(encode(w, *grid, qtype), *grid, qtype)


@pytest.mark.parametrize("qtype", ["int4", "uint4"])
def test_the_search_finds_the_exponent_of_least_error_at_the_output(qtype):
    x, w = inputs(), jax.random.normal(jax.random.key(2), (24, 32))
    mean = jnp.abs(x).mean(axis=0)
    s, alpha, losses = search_factors(mean, [(w, x.T @ x / 300)], [8], qtype, steps=10)
    # By the definition: the squared error of the layer's output on the very rows, an exponent at a time.
    tried = []
    for a in np.linspace(0, 1, 11):
        by_hand = mean**a / jnp.sqrt((mean**a).max() * (mean**a).min())
        d = w - rounded(w * by_hand, qtype) / by_hand
        tried.append(float(jnp.square(x @ d.T).sum() / 300))
    np.testing.assert_allclose(losses, tried, rtol=1e-3)
    best = int(np.argmin(tried))
    assert best > 0 and float(alpha) == pytest.approx(best / 10) and losses.min() < 0.7 * losses[0]
    np.testing.assert_allclose(
        s, mean ** (best / 10) / jnp.sqrt((mean ** (best / 10)).max() * (mean ** (best / 10)).min()), rtol=1e-4
    )


def test_exponent_zero_is_rounding_to_nearest_and_never_beaten_by_the_choice():
    x, w = inputs(), jax.random.normal(jax.random.key(2), (24, 32))
    hessian, mean = x.T @ x / 300, jnp.abs(x).mean(axis=0)
    _, _, losses = search_factors(mean, [(w, hessian), (2 * w, hessian)], [8, 16], "int4")
    d, e = w - rounded(w), 2 * (w - rounded(w, group=16))
    np.testing.assert_allclose(losses[0], ((d @ hessian) * d).sum() + ((e @ hessian) * e).sum(), rtol=1e-4)
    assert losses.min() <= losses[0]
    s, alpha, _ = search_factors(mean, [(rounded(w), hessian)], [8], "int4")  # nothing to gain: on the grid already
    assert float(alpha) == 0 and (s == 1).all()


def test_experts_have_exponents_of_their_own():
    x = jnp.stack([inputs(spread=s) for s in (0.1, 3.0)])
    hessian, mean = jnp.einsum("eti,etj->eij", x, x) / 300, jnp.abs(x).mean(axis=1)
    w = jax.random.normal(jax.random.key(2), (2, 24, 32))
    together = search_factors(mean, [(w, hessian)], [8], "int4")
    for e in range(2):
        alone = search_factors(mean[e], [(w[e], hessian[e])], [8], "int4")
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[..., e] if a.ndim == 2 and a.shape[0] == 21 else a[e], b, rtol=1e-4)
    assert together[1][0] != together[1][1]


@pytest.mark.parametrize("qtype", ["int4", "uint4"])
def test_a_searched_range_loses_no_more_in_any_group(qtype):
    x, w = inputs(), jax.random.normal(jax.random.key(2), (24, 32)) ** 3
    hessian = x.T @ x / 300
    whole, cut = scales(w, qtype, 8), search_range(w, hessian, qtype, 8)

    def loss(grid):
        d = (w - decode(nearest(w, *grid, qtype), *grid, qtype)).reshape(24, 4, 8)
        return np.stack(
            [((d[:, g] @ hessian[g * 8 : g * 8 + 8, g * 8 : g * 8 + 8]) * d[:, g]).sum(1) for g in range(4)]
        )

    assert (loss(cut) <= loss(whole) * (1 + 1e-4)).all() and loss(cut).sum() < 0.9 * loss(whole).sum()


def test_scaling_alone_is_the_identity_on_logits(program, calibration):
    tokens = calibration.tokens[:2]
    scaled = AWQ(group=8, rounding=False, calibration=calibration)(program)
    changed = [p for p, leaf in leaves(scaled.model).items() if not np.array_equal(leaf, leaves(program.model)[p])]
    assert any("attention_norm" in p for p in changed) and any("down" in p for p in changed)
    before = logits(program, tokens)
    np.testing.assert_allclose(logits(scaled, tokens), before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("options", [{}, {"clip": False, "symmetric": False}])
def test_the_pass_loses_less_than_rounding_to_nearest_on_its_text(program, calibration, options):
    exact = logits(program, calibration.tokens)
    nearest = Int4(group=8, embedding=False, symmetric=options.get("symmetric", True))(program)
    done = AWQ(group=8, embedding=False, calibration=calibration, **options)(program)
    assert 0 < lost(done, exact, calibration.tokens) < 0.8 * lost(nearest, exact, calibration.tokens)


@pytest.fixture(scope="module")
def uneven():
    return uneven_program()


def test_without_its_searches_it_is_int4(uneven):
    plain = AWQ(group=8, steps=0, clip=False, calibration=random_text(uneven))(uneven)
    for a, b in zip(jax.tree.leaves(plain.model), jax.tree.leaves(Int4(group=8)(uneven).model), strict=True):
        # Under jit a division by a constant may be a product: a scale, and a code on an edge, off by one rounding.
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-6)
        else:
            assert (np.asarray(a) == np.asarray(b)).mean() > 0.999


def test_what_is_left_alone_is_not_scaled(uneven):
    some = AWQ(group=8, where=r".*attention\.qkv.*", embedding=False, calibration=random_text(uneven))(uneven)
    before = leaves(uneven.model)
    changed = {p for p, leaf in leaves(some.model).items() if p not in before or not np.array_equal(leaf, before[p])}
    assert changed and all(".attention" in p for p in changed) and not any(".attention.o" in p for p in changed)


def test_unknown_folds_are_named(uneven):
    with pytest.raises(InputError, match="did you mean 'qkv'"):
        AWQ(folds=("qkw",), calibration=random_text(uneven))(uneven)
