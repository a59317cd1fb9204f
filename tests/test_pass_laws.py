"""The laws that every registered pass obeys, alone and after every other. A new pass inherits them all."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import data_dir
from models import random_program, tiny_config, tiny_moe

from jaxinfer.errors import InputError
from jaxinfer.eval.data import read_text
from jaxinfer.eval.perplexity import perplexity
from jaxinfer.ops.quantized import nbytes
from jaxinfer.passes import PASSES, apply, parse
from jaxinfer.passes.base import About, Calibrated, conflict, option_fields
from jaxinfer.passes.calibration import Calibration
from jaxinfer.program import Program
from jaxinfer.tree import leaves

SLOTS, LENGTH = 256, 150
IDS = (np.arange(LENGTH) * 11 % 96).astype(np.int32)[None]
FORMS = [f"{name}:{form}" for name in PASSES for form in PASSES[name].about.forms]
ALONE = [*PASSES, *FORMS]
DEPTH = [name for name in PASSES if PASSES[name].about.family == "depth"]
# Depth passes change neither kernels nor caches: of each kind of node that others put in, one pass stands for all.
STAND_INS = {*DEPTH, "w8a8", "quarot", "kv_int4"}
# Settings at which they do something to a text of 101 tokens in one or two layers.
SETTINGS = {"early_exit": {"threshold": 0.3}, "skip_decode": {"end": 40}, "kv_window": {"window": 40}}
PAIRS = [
    (first, then)
    for first, then in itertools.product(ALONE, ALONE)
    if {first, then} <= {*STAND_INS, *FORMS} or not {first, then} & {*DEPTH, *FORMS}
]


def about(name: str) -> About:
    """Return what a pass declares of itself, in a form where one is named."""
    name, _, form = name.partition(":")
    declared = PASSES[name].about
    return dataclasses.replace(declared, bound=declared.forms[form], lossless=False) if form else declared


@functools.cache
def base(kind: str = "dense") -> Program:
    """Return a program whose sizes suit groups and rotations, with all that a layer may have."""
    shared = dict(embed_dim=64, mlp_dim=128, head_dim=16, windows=(), qkv_bias=True, tie_embeddings=False)
    if kind in ("1", "2", "3"):  # layers: pairs are many, so they have few; tied where no token is to leave on the way
        return random_program(tiny_config(**{**shared, "num_layers": int(kind), "tie_embeddings": kind == "1"}))
    return random_program(tiny_config(**shared, **({"moe": tiny_moe(expert_dim=32)} if kind == "experts" else {})))


@functools.cache
def calibration(kind: str = "dense") -> Calibration:
    return Calibration.of(base(kind), (np.arange(256) * 7 % 96).tolist(), window=32)


def applied(name: str, kind: str = "dense", **options) -> Program:
    return apply(base(kind), dataclasses.replace(parse(name), **options), calibration=calibration(kind))


@functools.cache
def kept(name: str, kind: str = "dense", **settings) -> Program:
    """Return `applied` for a test that only reads it: some passes learn for seconds, and many tests ask for each."""
    return applied(name, kind, **settings)


@jax.jit
def _logits(model, ids, cache):
    hidden, cache = model(ids, cache)
    return model.logits(hidden), cache


def prefill(program: Program, ids: np.ndarray = IDS) -> np.ndarray:
    return np.asarray(_logits(program.model, ids, program.model.init_cache(1, SLOTS))[0][0])


def stepwise(program: Program, ids: np.ndarray = IDS) -> np.ndarray:
    cache, out = program.model.init_cache(1, SLOTS), []
    for t in range(ids.shape[1]):
        logits, cache = _logits(program.model, ids[:, t : t + 1], cache)
        out.append(np.asarray(logits[0, 0]))
    return np.stack(out)


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-4) -> None:
    """Assert equality relative to the spread of the logits."""
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("name", ALONE)
def test_the_input_is_untouched(name):
    program = base()
    before = {path: (id(leaf), np.asarray(leaf).copy()) for path, leaf in leaves(program.model).items()}
    out = applied(name)
    after = leaves(program.model)
    assert program.passes == () and set(after) == set(before)
    assert all(id(leaf) == before[path][0] for path, leaf in after.items())
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path][1], err_msg=path)
    kind = type(parse(name))
    assert out.passes[0][0] == kind.name and set(out.passes[0][1]) >= {f.name for f in option_fields(kind)}


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("name", ALONE)
def test_shapes_are_enough(name, kind):
    """The structure, shapes and dtypes of the result are known without weights, without text, in both ways."""
    try:
        real = kept(name, kind)
    except InputError as e:
        assert kind == "experts" and "expert" in str(e)  # refused with the reason
        return
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(real.model)]
    tree = jax.eval_shape(lambda model: model, base(kind).model)
    by_shapes = apply(base(kind).replace(model=tree), *real.passes).model
    traced = jax.eval_shape(lambda m: apply(base(kind).replace(model=m), *real.passes).model, base(kind).model)
    for abstract in (by_shapes, traced):
        assert jax.tree.structure(abstract) == jax.tree.structure(real.model)
        assert [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)] == shapes


@pytest.mark.parametrize("name", [n for n in ALONE if "where" in {f.name for f in option_fields(type(parse(n)))}])
def test_a_pattern_that_matches_nothing_is_refused(name):
    with pytest.raises(InputError, match=r"where='no such node': matches no .*there are .*attention"):
        applied(name, where="no such node")


def rounds(name: str, options: Mapping[str, object]) -> bool:
    """Return whether a pass, as it was applied, rounds what is computed on the way."""
    form = any(f"{option}={value}" in PASSES[name].about.forms for option, value in options.items())
    return form or PASSES[name].about.rounds_activations


def assert_same_run(program: Program, run: Callable, before: Program, ids: np.ndarray = IDS) -> None:
    """Assert that a text run in parts, by `run`, gives the logits of the whole run.

    Where activations, or cached keys and values, are rounded, the last bit of a float decides over a whole step now
    and then. Such a program is its own within a tenth of what the rounding itself does to `before`, and its early
    tokens are the same to the last bits in one of four texts: what a cache does wrong it does in all of them.
    """
    parts, whole = run(program, ids), prefill(program, ids)
    if not any(rounds(name, options) for name, options in program.passes):
        assert_close(parts, whole)
        return
    assert np.linalg.norm(parts - whole) <= 0.1 * np.linalg.norm(whole - prefill(before, ids))
    for other in range(4):
        if other:
            text = (ids + 7 * other) % 96
            parts, whole = run(program, text), prefill(program, text)
        early = np.median(np.abs(parts[:8] - whole[:8])) / np.abs(whole).max()
        if early <= 1e-4:
            return
    raise AssertionError(f"early tokens differ in four texts, in the last by {early:.1e} of the largest logit")


def in_three_parts(program: Program, ids: np.ndarray) -> np.ndarray:
    """Return the logits of a text in three parts, one of them a single token."""
    cache, parts = program.model.init_cache(1, SLOTS), []
    for start, end in ((0, 50), (50, 51), (51, 101)):
        part, cache = _logits(program.model, ids[:, start:end], cache)
        parts.append(np.asarray(part[0]))
    return np.concatenate(parts)


@pytest.mark.parametrize("name", ALONE)
def test_prefill_equals_step_by_step(name):
    assert_same_run(kept(name), stepwise, base())


@pytest.mark.parametrize("name", [n for n in ALONE if about(n).degenerate is not None])
def test_the_degenerate_setting_is_the_baseline(name):
    program = applied(name, **about(name).degenerate)
    assert_close(prefill(program), prefill(base()), 1e-5)


@pytest.mark.parametrize("name", ALONE)
def test_a_pass_is_lossless_or_says_that_it_is_not(name):
    difference = np.abs(prefill(kept(name)) - prefill(base())).max() / np.abs(prefill(base())).max()
    assert (difference < 1e-4) if about(name).lossless else (difference > 1e-6)


def fork_bytes(program: Program, length: int) -> int:
    """Return the bytes of a cache of four rows that go on from a prefix of `length` tokens, for one token more."""

    def fork(cache):
        return cache.fork(jnp.zeros(4, jnp.int32), jnp.full(4, length), 1)

    return nbytes(jax.eval_shape(fork, jax.eval_shape(lambda: program.model.init_cache(1, length))))


@pytest.mark.parametrize("name", ALONE)
def test_the_graph_that_runs_did_change(name):
    """A pass can't be a flag: the compiled step reads other bytes, keeps other bytes, or computes something else."""
    sizes = {}
    for label, program in (("before", base()), ("after", kept(name))):
        step = _logits.lower(program.model, IDS[:, :1], program.model.init_cache(1, SLOTS)).compile()
        cache = [nbytes(program.model.init_cache(1, n)) for n in (SLOTS, 4 * SLOTS)]
        sizes[label] = {
            "weight_bytes": nbytes(program.model),
            "cache_bytes": cache[1] - cache[0],  # what grows with the context
            "fork_bytes": fork_bytes(program, 4 * SLOTS) - fork_bytes(program, SLOTS),
            "flops": step.cost_analysis()["flops"],
            "arguments": step.memory_analysis().argument_size_in_bytes,
        }
    before, after, changes = sizes["before"], sizes["after"], about(name).changes
    if changes == "flops":
        assert after["flops"] != before["flops"]
    elif changes == "fork_bytes":
        assert after["fork_bytes"] < 0.6 * before["fork_bytes"], (before, after)
        assert " gather(" in step.as_text() and before["arguments"] != after["arguments"]
        assert about(name).lossless or after["cache_bytes"] < 0.6 * before["cache_bytes"]
    else:
        assert after[changes] < 0.6 * before[changes], (before, after)
        assert after["arguments"] < before["arguments"]


@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_compiled_twice(name):
    program = kept(name)
    step = jax.jit(lambda model, ids, cache: model(ids, cache))
    _, cache = step(program.model, IDS[:, :1], program.model.init_cache(1, SLOTS))
    step(applied(name).model, IDS[:, 1:2], cache)
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", ALONE)
def test_the_declared_bound_holds_on_a_trained_model(name, stories):
    data = data_dir()
    text = read_text(next((data / "tinystories").glob("*.txt*"))) if (data / "tinystories").is_dir() else None
    if text is None:
        pytest.skip("no tinystories in the data folder: set JAXINFER_DATA to the folder that has it")
    ids = stories.tokenizer.encode(text[:30_000])
    technique, bound = parse(name), about(name).bound
    if isinstance(technique, Calibrated):
        technique = dataclasses.replace(technique, calibration=Calibration.of(stories, ids[4096:], 16, 256))
    rise = perplexity(technique(stories), ids[:4096], 256) / _stories_perplexity(stories, ids) - 1
    assert rise <= bound, f"{name}: perplexity rises by {rise:.2%}"
    assert bound == 0 or rise > -0.05


_known: dict[str, float] = {}


def _stories_perplexity(stories: Program, ids: list[int]) -> float:
    if "stories" not in _known:
        _known["stories"] = perplexity(stories, ids[:4096], 256)
    return _known["stories"]


@pytest.mark.parametrize(("first", "then"), PAIRS, ids=map("-".join, PAIRS))
def test_a_pair_runs_and_keeps_its_laws_or_is_refused_with_a_reason(first, then):
    kind = str(1 + (first in DEPTH) + (then in DEPTH))
    program, text = base(kind), calibration(kind)
    technique, after = (dataclasses.replace(parse(name), **SETTINGS.get(name, {})) for name in (first, then))
    one = kept(first, kind, **SETTINGS.get(first, {}))
    reason = conflict(*one.passes[0], after)
    if reason:
        with pytest.raises(InputError, match=f"^{after.name} after {technique.name}: ") as refused:
            apply(one, after, calibration=text)
        assert reason in str(refused.value) and len(reason) > 20
        return
    both = apply(one, after, calibration=text)
    assert [name for name, _ in both.passes] == [technique.name, after.name]
    ids = IDS[:, :101]
    logits = prefill(both, ids)
    assert np.isfinite(logits).all()
    # What the cache holds does not depend on how it came there.
    assert_same_run(both, in_three_parts, program, ids)
    tree = jax.eval_shape(lambda model: model, program.model)
    abstract = apply(program.replace(model=tree), *both.passes).model
    assert jax.tree.structure(abstract) == jax.tree.structure(both.model)
    if not about(first).lossless and not about(then).lossless:
        assert np.abs(logits - prefill(one, ids)).max() > 0


def test_every_pass_says_what_it_is():
    for name, kind in PASSES.items():
        declared = kind.about
        assert kind.name == name and declared.family and declared.paper
        assert declared.changes in ("weight_bytes", "cache_bytes", "flops", "fork_bytes"), name
        assert declared.lossless == (declared.bound <= 0.001), name
        assert set(declared.conflicts) <= set(PASSES), name
        assert math.isfinite(declared.bound) and all(0.001 < bound < 1 for bound in declared.forms.values())
        fields = {f.name for f in option_fields(kind)}
        assert declared.degenerate is None or set(declared.degenerate) <= fields, name
