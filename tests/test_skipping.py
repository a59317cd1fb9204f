"""Layers left out for good, found by search, or left out for late positions; and what it saves, counted and timed."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command import TINY, caller, lines_of, stories_path
from data import data_dir
from models import random_program, tiny_config, tiny_moe

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.eval import skip_search
from jaxinfer.eval.exits import measure_exits, step_flops
from jaxinfer.eval.journal import Journal
from jaxinfer.eval.skip_search import search_skips
from jaxinfer.passes.depth.influence import block_influence
from jaxinfer.passes.depth.skip_decode import SkipDecode
from jaxinfer.passes.depth.skip_layers import read_skips
from jaxinfer.tree import replace

TOKENS = (np.arange(96) * 7 % 96).tolist()
SOME = np.array([TOKENS[:16]])


@functools.cache
def program():
    return random_program(tiny_config(num_layers=3, windows=()))


@pytest.fixture
def cli(capsys):
    return caller(capsys)


def test_the_configuration_follows_the_layers(tmp_path):
    config = tiny_config(num_layers=4, windows=(24, None, 8, None), moe=tiny_moe(layers=(1, 3)))
    before = random_program(config)
    after = ji.apply(before, "skip_layers:layers=0+1")
    assert (after.config.num_layers, after.config.windows, after.config.moe.layers) == (2, (8, None), (1,))
    assert after.model.layers[0] is before.model.layers[2] and after.model.layers[1] is before.model.layers[3]
    ji.save(after, tmp_path / "saved")
    again = ji.load(tmp_path / "saved")
    assert again.passes == after.passes and again.config == after.config
    np.testing.assert_allclose(ji.logits(again, SOME), ji.logits(after, SOME), atol=1e-5)


def test_influence_is_nothing_where_a_layer_does_nothing():
    """Layers whose output projections are zero change nothing: they are the first to go, and nobody misses them."""
    idle = jax.tree.map(jnp.zeros_like, program().model.layers[1])
    layers = [program().model.layers[0], idle, program().model.layers[2]]
    lazy = program().replace(model=replace(program().model, layers=layers))
    text = ji.Calibration.of(lazy, TOKENS, window=32)
    influence = block_influence(lazy.model, text)
    assert abs(influence[1]) < 1e-6 and min(influence[0], influence[2]) > 0.01
    out = ji.apply(lazy, "skip_layers:count=1", calibration=text)
    assert dict(out.passes)["skip_layers"]["layers"] == (1,)
    np.testing.assert_allclose(ji.logits(out, SOME), ji.logits(lazy, SOME), atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("skip_layers:layers=3", r"layers=3: must be in 0\.\.2: the model has 3 layers"),
        ("skip_layers:layers=1+1", "names a layer twice"),
        ("skip_layers:layers=0+1+2", "would leave none of the 3 layers"),
        ("skip_layers:layers=1+x", r"layers='x': must be int"),
        ("skip_layers:count=3", r"count=3: must be in 0\.\.2"),
        ("skip_layers", "needs text to find the layers of least influence"),
        ("skip_layers:file=absent.json", "absent.json: No such file"),
        ("skip_layers:file=pyproject.toml", "has no list of layers"),
        ("skip_layers:layers=1,file=x.json", "layers= is given too"),
        ("skip_decode:share=0", "must be above 0 and at most 1"),
        ("skip_decode:start=9,end=9", "must be 0 <= start < end"),
    ],
)
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(InputError, match=message):
        ji.apply(program(), spec)


def test_a_search_finds_the_best_set_and_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    tried = []
    real = skip_search._try
    monkeypatch.setattr(skip_search, "_try", lambda *args: tried.append(args[2]) or real(*args))

    def search(budget):
        with Journal(tmp_path / "skips.jsonl", run=1) as journal:
            return search_skips(program(), TOKENS, 1, budget, "kl", 32, journal=journal)

    first = search(2)
    assert first.tried == 2 and first.start.layers == (int(np.argmin(first.influence)),)
    found = search(10)  # there are only three sets
    assert found.tried == 3 and len(tried) == len(set(tried)) == 3
    assert found.best.kl == min(line["kl"] for line in lines_of(tmp_path / "skips.jsonl"))
    assert search(10) == found and len(tried) == 3
    with pytest.raises(InputError, match=r"count=3: must be in 1\.\.2"):
        search_skips(program(), TOKENS, 3, 1)


def test_the_commands_find_layers_apply_them_and_show_what_is_saved(cli, tmp_path):
    stories, text = stories_path(), next((data_dir() / "tinystories").glob("*.txt*"))
    out = tmp_path / "skips.json"
    args = ("--data", text, "--count", 2, "--budget", 3, "--max-tokens", 256, "--window", 128, "--out", out)
    status, said, err = cli("search-skips", stories, *args)
    assert status == 0, err
    choice = json.loads(out.read_text())
    assert choice["tried"] == 3 and choice["best"]["agreement"] >= choice["least_influence"]["agreement"]
    assert "3 sets tried, 0 of them before" in said
    assert "3 of them before" in cli("search-skips", stories, *args)[1]
    spec = f"skip_layers:file={out}"
    exits = ("--data", text, "--batches", 2, "--prompt-tokens", 8, "--steps", 8, "--rounds", 1)
    status, said, err = cli("exits", stories, "--pass", "int8", "--pass", spec, *exits, "--out", tmp_path / "exits")
    assert status == 0, err
    rows = lines_of(tmp_path / "exits" / "exits.jsonl")
    assert [row["batch"] for row in rows] == [2] and all(row["ran"] == row["depth"] == 3 for row in rows)
    assert (tmp_path / "exits" / "exits.png").stat().st_size > 10_000 and "layers run" in said
    assert tuple(choice["layers"]) == read_skips(out)


def test_what_leaving_early_saves_is_counted():
    full, early = program(), ji.apply(program(), "early_exit:threshold=0,first=1")
    one, two = measure_exits(full, early, TOKENS, (1, 2), prompt_tokens=8, steps=4, rounds=1)
    for found in (one, two):
        assert found.depth == found.ran == 1 and found.histogram == (0, 4 * found.batch, 0, 0)
        assert found.seconds.ratio > 0 and found.layers == 3
    c = full.config
    D, F, N, K, H, V = c.embed_dim, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim, c.vocab_size
    block = lambda context: 2 * D * (2 * N * H + 2 * K * H + 3 * F) + 4 * N * H * (context + 1)  # noqa: E731
    spent = block(8) + 2 * (4 * D * K * H) + 2 * (2 * D * V)  # one layer, two of keys and values, logits twice
    assert step_flops(early, np.array([True, False, False]), 8) == spent
    assert step_flops(full, np.ones(3, bool), 8) == 3 * block(8) + 2 * D * V
    mixed = ji.apply(full, "early_exit:threshold=0.3,first=1")
    many = measure_exits(full, mixed, TOKENS, (4,), prompt_tokens=8, steps=12, rounds=1)[0]
    assert 1 < many.depth < many.ran <= 3 and 0 < many.same < 1  # a layer runs while one row needs it
    never = measure_exits(full, ji.apply(full, "skip_decode:share=1"), TOKENS, (1,), 8, 4, 1)[0]
    assert (never.flops, never.same, never.ran) == (1, 1, 3)
    with pytest.raises(InputError, match="a text of 96 tokens: a batch of 16 takes 192"):
        measure_exits(full, early, TOKENS, (1, 16), 8, 4)


def test_later_tokens_never_run_more_layers_and_find_all_earlier_ones_there():
    for options in ({}, {"share": 0.3, "end": 40}, {"share": 0.5, "warmup": 3, "start": 10, "end": 11}, {"share": 1.0}):
        rule = SkipDecode(**options)
        for layers in (1, 2, 5, 30):
            depths = [rule.depth(p, layers) for p in range(rule.end + 9)]
            assert depths == sorted(depths, reverse=True) and depths[0] == layers
            assert depths[-1] == max(1, int(rule.share * layers))
            limits = [len(depths) if n is None else n for n in rule.limits(layers, 1000)]
            for p, depth in enumerate(depths):  # as many layers run as the rule says, the last one among them
                assert sum(p < n for n in limits) == depth and p < limits[-1]


def test_by_position_no_keys_are_computed_beyond_a_layers_limit_and_rows_are_independent():
    rule = "skip_decode:share=0.4,start=4,end=12,warmup=0"
    late = ji.apply(program(), rule)
    limits = late.model.limits
    assert limits[2] is None and limits[0] < limits[1] == 12
    run = jax.jit(lambda model, ids, cache, counts: model(ids, cache, counts))
    ids = jnp.array([TOKENS[:16], TOKENS[5:21]])
    hidden, cache = run(late.model, ids, late.model.init_cache(2, 32), jnp.array([16, 10]))
    for layer, limit in zip(cache.layers[:2], limits, strict=False):
        written = np.abs(np.asarray(layer.k)).sum(axis=(1, 3)) > 0
        assert written.sum(axis=1).tolist() == [limit, min(limit, 10)]
    cache = late.model.init_cache(2, 32)
    for t in range(16):  # the rows are not at the same position: the second one is ahead by three
        if t == 0:
            cache = run(late.model, ids[:, :3], cache, jnp.array([0, 3]))[1]
        fed = jnp.stack([ids[0, t : t + 1], ids[1, min(t + 3, 15)][None]])
        out, cache = run(late.model, fed, cache, jnp.array([1, int(t < 7)]))
        np.testing.assert_allclose(out[0, 0], hidden[0, t], atol=2e-4)
        if t < 7:
            np.testing.assert_allclose(out[1, 0], hidden[1, t + 3], atol=2e-4)
    drafted = ji.generate(ji.speculative(late, program(), length=3), [TOKENS[:6]], max_new_tokens=10).tokens
    np.testing.assert_array_equal(drafted, ji.generate(late, [TOKENS[:6]], max_new_tokens=10).tokens)


def test_a_command_without_a_depth_pass_says_which_there_are(cli):
    status, _, err = cli("exits", "--config", TINY, "--pass", "int8", "--data", TINY)
    assert status == 2 and "give --pass with one of skip_layers, early_exit, skip_decode" in err
