"""Tokens that leave early: each by itself, with keys and values for the layers that it does not run."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import MLP
from jaxinfer.ops.rope import rotate
from jaxinfer.passes.depth.criteria import Entropy, Gap, Patience, Saturation, Seen
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.tree import replace, rewrite

LAYERS, SLOTS = 3, 64
IDS = (jnp.arange(33, dtype=jnp.int32) * 11 % 96)[None]
# Every criterion at a threshold that some tokens of the text reach early, some late and some never.
MIXED = ["gap,threshold=0.3", "entropy,threshold=0.4", "saturation,threshold=0.45", "patience,threshold=1"]


@functools.cache
def full():
    return random_program(tiny_config(num_layers=LAYERS, windows=(), qk_norm=True))


def exits(criterion: str, first: int = 1):
    return ji.apply(full(), f"early_exit:criterion={criterion},first={first}")


@jax.jit
def _run(model, ids, cache, counts):
    x, cache, depth, _ = model.trace(model.embed(ids), cache, counts)
    return model.logits(model.final_norm(x)), cache.longer(counts), depth


def run(program, ids, cache=None, counts=None):
    cache = program.model.init_cache(len(ids), SLOTS) if cache is None else cache
    counts = np.full(len(ids), ids.shape[1], np.int32) if counts is None else counts
    return _run(program.model, ids, cache, counts)


def stepwise(program, ids):
    cache, found = None, []
    for t in range(ids.shape[1]):
        logits, cache, depth = run(program, ids[:, t : t + 1], cache)
        found.append((np.asarray(logits), np.asarray(depth)))
    return tuple(np.concatenate(x, axis=1) for x in zip(*found, strict=True))


@pytest.mark.parametrize("criterion", ["gap,threshold=1.01", "saturation,threshold=1.01", "patience,threshold=9"])
def test_a_threshold_out_of_reach_is_the_full_model(criterion):
    logits, _, depth = run(exits(criterion), IDS)
    assert (depth == LAYERS).all()
    np.testing.assert_allclose(logits, ji.logits(full(), IDS), atol=1e-4)


@pytest.mark.parametrize("criterion", ["gap,threshold=0", "entropy,threshold=0", "patience,threshold=0"])
def test_a_threshold_that_is_always_reached_is_the_first_exit(criterion):
    logits, _, depth = run(exits(criterion), IDS)
    assert (depth == 1).all()
    shallow = ji.apply(full(), "skip_layers:layers=1+2")
    np.testing.assert_allclose(logits, ji.logits(shallow, IDS), atol=1e-4)


def test_missing_keys_and_values_are_projections_of_the_state_that_was_left():
    program = exits("gap,threshold=0")
    _, cache, _ = run(program, IDS)
    hidden, _, _ = full().model.run_layers(
        full().model.embed(IDS), full().model.init_cache(1, SLOTS), jnp.array([IDS.shape[1]]), end=1
    )
    for layer, kept in zip(program.model.layers[1:], cache.layers[1:], strict=True):
        a, x = layer.attention, layer.attention_norm(hidden)
        keys = rotate(a.k_norm(a.qkv.k(x)), jnp.arange(IDS.shape[1])[None], a.rope)
        for found, wanted in ((kept.k, keys), (kept.v, a.qkv.v(x))):
            np.testing.assert_allclose(found[0, :, : IDS.shape[1]].swapaxes(0, 1), wanted[0], atol=1e-5)


@pytest.mark.parametrize("criterion", MIXED)
def test_a_prompt_leaves_where_its_tokens_leave_one_by_one(criterion):
    program = exits(criterion)
    logits, _, depth = run(program, IDS)
    assert len(np.unique(depth)) > 1
    alone, single = stepwise(program, IDS)
    np.testing.assert_array_equal(depth, single)
    np.testing.assert_allclose(logits, alone, atol=2e-4)


def test_rows_leave_by_themselves_in_a_ragged_batch():
    program = exits(MIXED[0])
    rows, counts = np.zeros((3, 33), np.int32), np.array([33, 20, 0], np.int32)
    for b, n in enumerate(counts):
        rows[b, :n] = (np.arange(n) * (7 + 4 * b) + b) % 96
    logits, _, depth = run(program, rows, counts=counts)
    for b, n in enumerate(counts[:2]):
        alone, _, single = run(program, np.pad(rows[b : b + 1, :n], ((0, 0), (0, 33 - n))), counts=np.array([n]))
        np.testing.assert_array_equal(depth[b], single[0])
        np.testing.assert_allclose(logits[b, :n], alone[0, :n], atol=1e-4)
    assert not depth[1, 20:].any() and not depth[2].any()


@nnx.dataclass
class Counted(nnx.Module):
    """An MLP that tells whenever it is really run."""

    mlp: nnx.Module = nnx.data()
    runs: Any = nnx.static(kw_only=True)

    def __call__(self, x):
        jax.debug.callback(lambda: self.runs.append(1))
        return self.mlp(x)


class Log(list):
    """A list that can be part of a static structure."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def test_a_layer_that_no_row_needs_is_not_run():
    runs = Log()
    program = exits("gap,threshold=0.3")
    last = rewrite(program.model.layers[-1], MLP, ".*", lambda node: Counted(node, runs=runs))
    program = program.replace(model=replace(program.model, layers=[*program.model.layers[:-1], last]))
    rows, cache, needed = jnp.concatenate([IDS, (IDS + 5) % 96]), None, []
    for t in range(IDS.shape[1]):
        _, cache, depth = run(program, rows[:, t : t + 1], cache)
        needed.append(bool((depth == LAYERS).any()))
        if t == 0:
            jax.effects_barrier()
    jax.effects_barrier()
    assert len(runs) == sum(needed) and 0 < sum(needed) < len(needed)


def test_it_runs_on_fused_layouts_and_quantized_weights_and_caches():
    """Keys and values are had without queries: fused projections are taken apart, and give the same numbers."""
    fused = replace(full().model, layers=[apply_layouts(x, ("fused", "long_last")) for x in full().model.layers])
    how = ("int8", "kv_int8", "early_exit:threshold=0.3,first=1")
    plain, apart = (ji.apply(p, *how) for p in (full(), full().replace(model=fused)))
    one, other = run(plain, IDS), run(apart, IDS)
    np.testing.assert_array_equal(one[2], other[2])
    np.testing.assert_allclose(one[0], other[0], atol=1e-4)
    assert hasattr(apart.model.layers[0].attention.qkv, "linear")  # below the first exit it stays
    assert not hasattr(apart.model.layers[1].attention.qkv, "linear")


def test_it_generates_and_drafts():
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9]]
    early = exits(MIXED[0])
    answer = ji.generate(early, prompts, max_new_tokens=12).tokens
    logits, _, depth = run(early, jnp.array([prompts[0] + answer[0].tolist()]))
    np.testing.assert_array_equal(np.argmax(logits[0, 2:-1], axis=1), answer[0])
    assert len(np.unique(depth)) > 1
    plain = ji.generate(full(), prompts, max_new_tokens=12)
    drafted = ji.generate(ji.speculative(full(), early, length=3), prompts, max_new_tokens=12)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)


def test_criteria_by_hand():
    p = jnp.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0]])
    x, y = jnp.array([[[1.0, 0, 0], [0, 1.0, 0]]]), jnp.array([[[1.0, 1.0, 0], [0, 2.0, 0]]])
    seen = Seen(x, y, lambda x: x, lambda x: jnp.log(p)[None], 3)
    np.testing.assert_allclose(Gap(threshold=0.5).confidence(seen), [[0.2, 1.0]], atol=1e-6)
    entropy = -sum(q * np.log(q) for q in (0.5, 0.3, 0.2))
    narrow = Entropy(threshold=0.5).confidence(seen._replace(logits=lambda x: jnp.log(jnp.maximum(p, 1e-30))[None]))
    np.testing.assert_allclose(narrow, [[1 - entropy / np.log(3), 1.0]], atol=1e-6)
    np.testing.assert_allclose(Saturation(threshold=0.5).confidence(seen), [[0.5**0.5, 1.0]], atol=1e-6)
    patience, memory = Patience(patience=2), Patience(patience=2).start((1, 2))
    answers = ([0, 1], [0, 2], [0, 2], [1, 2])  # the likeliest token of the two at four exits
    left = []
    for best in answers:
        scores = jax.nn.one_hot(jnp.array(best), 3)
        may, memory = patience.leaves(seen._replace(logits=lambda x, s=scores: s[None]), memory)
        left.append(np.asarray(may)[0].tolist())
    assert left == [[False, False], [False, False], [True, False], [False, True]]


def test_a_learned_head_comes_from_a_file_and_is_saved(tmp_path):
    w = np.zeros(32, np.float32)
    np.savez(tmp_path / "head.npz", w=w, b=np.float32(-1))
    never = ji.apply(full(), f"early_exit:criterion=head,first=1,file={tmp_path / 'head.npz'}")  # sigmoid(-1) < 0.5
    assert (run(never, IDS)[2] == LAYERS).all()
    assert (run(exits("head"), IDS)[2] == 1).all()  # without a file: zeros, and one half is enough
    (tmp_path / "head.npz").unlink()
    ji.save(never, tmp_path / "saved")
    again = ji.load(tmp_path / "saved")
    assert again.passes == never.passes and float(again.model.criterion.router.bias[0]) == -1
    np.testing.assert_allclose(run(again, IDS)[0], run(never, IDS)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("early_exit:criterion=gapp", "no such|did you mean 'gap'"),
        ("early_exit:first=3", r"must be in 1\.\.2: the model has 3 layers"),
        ("early_exit:threshold=-1", "must be 0 or more"),
        ("early_exit:every=0", "must be 1 or more"),
        ("early_exit:file=x.npz", "only criterion=head has weights"),
        ("early_exit:criterion=head,file=absent.npz", "absent.npz: No such file"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        ji.apply(full(), spec)


def test_some_of_its_layers_alone_are_refused():
    model = exits("gap").model
    with pytest.raises(InputError, match="its layers run together"):
        model.run_layers(model.embed(IDS), model.init_cache(1, SLOTS), jnp.array([33]), end=1)
