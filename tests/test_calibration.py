"""The sweep: its statistics are those of the activations, whatever the batches, and a killed one goes on."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config, tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.passes import calibration
from jaxinfer.passes.base import About, Calibrated
from jaxinfer.passes.calibration import Calibration, Saved, forward, sweep
from jaxinfer.tree import leaves, replace, rewrite_by_path

WANTS = ("absmax", "mean_abs", "hessian")
ALL = dict(qkv_bias=True, qk_norm=True, post_norms=True, windows=())


def tokens(count: int = 96) -> list[int]:
    return (np.arange(count) * 7 % 96).tolist()


@pytest.fixture(scope="module")
def program():
    return random_program(tiny_config(moe=tiny_moe(), **ALL))


def statistics(program, **options):
    seen = []
    text = Calibration.of(program, tokens(), window=12, **options)

    def visit(layer, stats):
        jax.debug.callback(lambda stats: seen.append(stats), stats, ordered=True)
        return layer

    sweep(program.model, text, WANTS, visit, "look")
    jax.effects_barrier()
    return seen


def test_the_statistics_are_those_of_the_inputs(program):
    x = program.model.embed(jnp.asarray(tokens()).reshape(-1, 12))
    block = program.model.layers[0]
    rows = np.asarray(block.attention_norm(x), np.float64).reshape(-1, 32)
    hidden = block.attention_norm(x)
    q, gate = statistics(program)[0]["attention.qkv.q"], statistics(program)[0]["mlp.gate_up.gate"]
    np.testing.assert_allclose(q["absmax"], np.abs(rows).max(0), rtol=1e-5)
    np.testing.assert_allclose(q["mean_abs"], np.abs(rows).mean(0), rtol=1e-5)
    np.testing.assert_allclose(q["hessian"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert gate["hessian"].shape == (32, 32) and not np.allclose(gate["hessian"], q["hessian"])
    assert hidden.shape == (8, 12, 32)


def test_every_linear_map_is_seen(program):
    first, second = statistics(program)
    assert set(first) == {
        *(f"attention.qkv.{n}" for n in "qkv"), "attention.o", "mlp.gate_up.gate", "mlp.gate_up.up", "mlp.down"
    }  # fmt: skip
    assert {"mlp.router", "mlp.gate", "mlp.up", "mlp.down"} <= set(second)
    assert second["mlp.gate"]["hessian"].shape == (4, 32, 32)
    assert second["mlp.down"]["absmax"].shape == (4, 24)
    # Every token goes to two experts: their second moments, each a mean over its own tokens, add up to the router's.
    router = second["mlp.router"]
    assert np.all(second["mlp.gate"]["absmax"] <= router["absmax"] + 1e-6)
    assert np.allclose(second["mlp.gate"]["absmax"].max(axis=0), router["absmax"])


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_batches_do_not_matter(program, batch_size):
    for one, other in zip(statistics(program), statistics(program, batch_size=batch_size), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), one, other)


def test_a_layer_sees_what_the_layers_below_have_become(program):
    changed = []

    def visit(layer, stats):
        jax.debug.callback(lambda s: changed.append(s["attention.qkv.q"]["mean_abs"]), stats, ordered=True)
        return rewrite_by_path(layer, Linear, ".*[.]o", lambda _, n: replace(n, kernel=0 * n.kernel))

    sweep(program.model, Calibration.of(program, tokens(), window=12), WANTS, visit, "zero")
    jax.effects_barrier()
    kept = [s["attention.qkv.q"]["mean_abs"] for s in statistics(program)]
    np.testing.assert_allclose(changed[0], kept[0], rtol=1e-6)
    assert np.abs(changed[1] - kept[1]).max() > 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shift(Calibrated):
    """Adds the inputs' mean magnitude to kernels, so that the result depends on the text."""

    name: ClassVar[str] = "shift"
    about: ClassVar[About] = About(family="test", paper="none")
    wants: ClassVar[tuple[str, ...]] = ("mean_abs",)

    def visit(self, block, stats):
        def shift(path, node):
            by = stats[path]["mean_abs"].reshape(node.kernel.shape[0], -1)
            return replace(node, kernel=node.kernel + 0.01 * by[:, :1] if node.kernel.ndim == 2 else node.kernel)

        return rewrite_by_path(block, Linear, ".*", shift)


def test_a_killed_sweep_goes_on(program, tmp_path, monkeypatch):
    whole = Shift(calibration=Calibration.of(program, tokens(), window=12))(program)
    shift = Shift(calibration=Calibration.of(program, tokens(), window=12, directory=tmp_path))
    write, measured = Saved.write, []

    def killed(self, index, layer, hidden):
        write(self, index, layer, hidden)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Saved, "write", killed)
        shift(program)
    assert (tmp_path / "layer-0.npz").exists() and not (tmp_path / "layer-1.npz").exists()
    statistics_of = calibration._statistics
    monkeypatch.setattr(calibration, "_statistics", lambda *a: measured.append(1) or statistics_of(*a))
    for expected in (1, 0):  # layers left to do: the second one, then none
        measured.clear()
        resumed = shift(program)
        assert len(measured) == expected
        for path, leaf in leaves(resumed.model).items():
            np.testing.assert_array_equal(leaf, leaves(whole.model)[path], err_msg=path)


def test_a_directory_of_another_sweep_is_refused(program, tmp_path):
    Shift(calibration=Calibration.of(program, tokens(), window=12, directory=tmp_path))(program)
    other = Calibration.of(program, tokens(48), window=12, directory=tmp_path)
    with pytest.raises(InputError, match="written by another calibration"):
        Shift(calibration=other)(program)


def test_shapes_are_enough(program):
    abstract = program.replace(model=jax.eval_shape(lambda m: m, program.model))
    out = Shift()(abstract)
    assert [leaf.shape for leaf in jax.tree.leaves(out.model)] == [x.shape for x in jax.tree.leaves(program.model)]
    assert out.passes == (("shift", {}),)


def test_a_pass_without_text_says_so(program):
    with pytest.raises(InputError, match="shift: needs text to calibrate on"):
        Shift()(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0: must be in 1..512"),
        ({"window": 513}, "window=513: must be in"),
        ({"windows": 0}, "windows=0: must be 1 or more"),
        ({"window": 97}, "of 96 tokens: one window takes 97"),
    ],
)
def test_bad_calibrations_are_refused(program, options, message):
    with pytest.raises(InputError, match=message):
        Calibration.of(program, tokens(), **options)


def test_text_needs_a_tokenizer_and_ids_a_vocabulary(program):
    with pytest.raises(InputError, match="has no tokenizer"):
        Calibration.of(program, "some text")
    with pytest.raises(InputError, match=r"outside 0\.\.95"):
        Calibration.of(program, [1] * 20 + [96], window=4)
    assert Calibration.of(program, tokens(), windows=3, window=10).tokens.shape == (3, 10)


def test_a_layer_alone_is_the_layer_in_the_model(program):
    ids = jnp.asarray(tokens(24)).reshape(2, 12)
    x = program.model.embed(ids)
    for layer in program.model.layers:
        x = forward(layer, x)
    hidden, _ = program.model(ids, program.model.init_cache(2, 12))
    np.testing.assert_allclose(program.model.final_norm(x), hidden, rtol=1e-4, atol=1e-5)


def test_an_unknown_statistic_is_named(program):
    with pytest.raises(InputError, match="no statistic 'kurtosis'"):
        sweep(program.model, None, ("kurtosis",), lambda layer, _: layer, "x")
