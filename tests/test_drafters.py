"""What drafters find, how much of it is drafted, and what they are told of it."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config
from test_speculative import CORPUS, PROMPTS, drafters, target

from jaxinfer.decode import costs, loop
from jaxinfer.decode.base import run
from jaxinfer.decode.draft import Known
from jaxinfer.decode.drafters.datastore import Datastore, suffix_array
from jaxinfer.decode.drafters.exit import Exit
from jaxinfer.decode.drafters.lookahead import Lookahead
from jaxinfer.decode.drafters.model import DraftModel
from jaxinfer.decode.drafters.ngram import NGram
from jaxinfer.decode.pace import Costs, Pace, choose_width
from jaxinfer.decode.sampling import Sampling
from jaxinfer.decode.speculative import Speculative
from jaxinfer.generation import logits
from jaxinfer.models.layers import Linear
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.session import Session
from jaxinfer.tree import rewrite


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ([1, 2, 3, 4, 9, 9, 2, 3], {}, [4, 9, 9, 2]),
        ([1, 2, 3, 4, 5, 2, 3, 6, 1, 2, 3], {}, [4, 5, 2, 3]),  # the longest match, not the latest
        ([5, 2, 3, 6, 7, 2, 3, 8, 9, 2, 3], {}, [8, 9, 2, 3]),  # of equals the latest
        ([7, 8, 7, 8, 7, 8], {}, [7, 8, 7, 8]),  # a text that repeats itself goes on
        ([1, 2, 3, 4], {}, None),
        ([1, 2, 3, 2], {"least": 2}, None),  # one token is too little
        ([1, 2, 3, 2], {}, [3, 2, 3, 2]),
        ([4], {}, None),
    ],
)
def test_prompt_lookup(text, options, expected):
    tokens = jnp.asarray([text + [0] * 4, ([1, 2] * 8)[: len(text) + 4]], jnp.int32)  # what is past a row means nothing
    known = Known(tokens, jnp.asarray([len(text), 5], jnp.int32))
    draft = NGram(length=4, **options).lookup(known)
    assert draft.count.tolist() == [0 if expected is None else 4, 4] and draft.laws is None
    assert expected is None or draft.tokens[0].tolist() == expected
    assert draft.tokens[1].tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize(
    "text,length,places",
    [
        ([4, 5, 6], 0, None),
        ([1, 2, 3, 1], 1, "once"),
        ([1, 2, 3, 1, 2, 4, 1], 1, "agree"),
        ([1, 2, 3, 1, 4, 1], 1, "differ"),
        ([7, 1, 2, 3, 8, 1, 4, 7, 1], 2, "once"),  # the longest match alone is asked: what followed 1 elsewhere is not
        ([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 5, 6], 4, "once"),
    ],
)
def test_prompt_lookup_trusts_what_several_places_agree_on(text, length, places):
    drafter = NGram(length=4)
    draft = drafter.lookup(Known(jnp.asarray([text + [0] * 4], jnp.int32), jnp.asarray([len(text)], jnp.int32)))
    index = 0 if places is None else 3 * length - 2 + ("once", "agree", "differ").index(places)
    assert draft.trust.tolist() == [index]
    once, agree, differ = (drafter.hopes[3 * 2 - 2 + n] for n in range(3))
    assert len(drafter.hopes) == 13 and differ < once < agree and NGram(most=2).hopes == drafter.hopes[:7]


def test_hopes_decide_before_anything_was_seen():
    parents = (-1, 0, 1, 2)
    gains = np.asarray(Pace.new((0.1, 0.9), 4).gains(parents, (0, 3)))
    costs = Costs(jnp.asarray([1.0, 1.4]), jnp.zeros(2))
    assert [int(choose_width(g, 1, costs, True)) for g in jnp.asarray(gains)] == [0, 1]


def test_a_datastore_finds_what_a_search_through_the_corpus_finds():
    corpus = np.asarray(CORPUS)
    order = suffix_array(corpus)
    assert order.tolist() == sorted(range(len(corpus)), key=lambda i: corpus[i:].tolist())
    store = Datastore.of(corpus, length=3, branches=2, least=1, most=3)
    texts = [CORPUS[40:50], [1, *CORPUS[100:102]], [95, 95, 95], CORPUS[498:], [CORPUS[7]]]
    lengths = [len(t) for t in texts]
    tokens = jnp.asarray([[*t, *[77] * (12 - len(t))] for t in texts], jnp.int32)
    draft = jax.jit(store.lookup)(Known(tokens, jnp.asarray(lengths, jnp.int32)))
    for row, text in enumerate(texts):
        found = {}
        for size in range(1, min(3, len(text)) + 1):
            at = [i for i in range(len(CORPUS) - size + 1) if CORPUS[i : i + size] == text[-size:]]
            if at:
                found = {"size": size, "next": [(CORPUS[i + size : i + size + 3] + [CORPUS[-1]] * 3)[:3] for i in at]}
        assert int(draft.trust[row]) == found.get("size", 0)
        assert int(draft.count[row]) == (6 if found else 0)
        if found:
            assert draft.tokens[row, :3].tolist() in found["next"] and draft.tokens[row, 3:].tolist() in found["next"]


def session_steps(program: Program, drafter: object, new: int = 49, **options) -> tuple[int, list[int]]:
    """Return the steps that one row took, and how many checks of each width there were."""
    session = Session(program.replace(decoder=Speculative(drafter, **options)))
    session.feed([PROMPTS[0]])
    assert sum(len(x[0]) for x in session.decode(new, stop_ids=())) == new
    return session.steps[0], session.checked


def idle(program: Program, layers: str) -> Program:
    """Return the program with layers that add nothing."""
    where = rf"layers\.{layers}\.(attention\.o|mlp\.down)"

    def silent(node: Linear) -> Linear:
        return Linear(jnp.zeros_like(node.kernel), eq=node.eq, axes=node.axes)

    return program.replace(model=rewrite(program.model, Linear, where, silent))


def test_lookahead_writes_n_grams_of_the_model():
    """Of a model whose next token depends on the last one alone, so that what each n-gram must be is known."""
    program = idle(target(), ".")
    after = np.asarray(logits(program, jnp.arange(96)[:, None]))[:, 0].argmax(axis=1)
    session = Session(program.replace(decoder=Speculative(Lookahead(window=4, levels=3, drafts=2))))
    session.feed([PROMPTS[0]])
    tokens = [t for new in session.decode(65, stop_ids=()) for t in new[0]]
    assert tokens[1:] == after[tokens[:-1]].tolist()
    grams = np.asarray(session.told.grams)[0]
    grams = grams[grams[:, 0] >= 0][4 * 3 :]  # the first passes have the guesses that the window began with
    assert len(grams) >= 40 and (grams[:, 1:] == after[grams[:, :-1]]).all()
    assert session.steps[0] < 40


def test_an_exit_that_is_the_target_is_kept_whole():
    """Layers that add nothing after the exit make the draft the target's own choice."""
    program = idle(random_program(tiny_config(num_layers=3, windows=(None,) * 3)), "[12]")
    steps, checked = session_steps(program, Exit(layers=1, length=3))
    assert steps == 12 and checked == [0, 12]


FREE, DEAR = Costs(jnp.ones(5), jnp.zeros(5)), Costs(jnp.asarray([1.0, 2.5, 4.0, 8.0, 16.0]), jnp.zeros(5))


@pytest.mark.parametrize("name", ["itself", "ngram"])
def test_what_is_drafted_is_what_is_worth_it(name):
    program = idle(target(), ".")  # its text comes round soon: drafts of what came before are right
    drafter = NGram(length=8, least=1) if name == "ngram" else DraftModel(program.model, length=8)
    few, free = session_steps(program, drafter, adapt=True, costs=FREE)
    many, dear = session_steps(program, drafter, adapt=True, costs=DEAR)
    assert few < 35 and free[4] > 0.3 * few
    assert many > 40 and dear[0] > 0.9 * many


def test_the_pace_learns_what_each_class_of_drafts_is_worth():
    parents = (-1, 0, 1, 0)
    pace = Pace.new((0.6, 0.6), 4)
    learn = functools.partial(pace.learn.__func__, parents=parents)
    for _ in range(200):  # class 1 always stands as far as node 2, of class 0 nothing does
        pace = learn(pace, trust=jnp.array([1, 0]), count=jnp.array([3, 3]), last=jnp.array([2, 0]))
    gains = np.asarray(pace.gains(parents, (0, 1, 2, 3)))
    np.testing.assert_allclose(gains[1], [0, 1, 2, 2], atol=0.1)
    assert gains[0].max() < 0.1
    costs = Costs(jnp.asarray([1.0, 1.2, 1.4, 1.6]), jnp.zeros(4))
    assert int(choose_width(jnp.asarray(gains[1]), 1, costs, True)) == 2
    assert int(choose_width(jnp.asarray(gains[0]), 1, costs, True)) == 0


class Curious(NGram):
    """A drafter that wants to know what the target's first layer made of the last token that stood."""

    wants = (0,)

    def prepare(self, model, rows, slots):
        return jnp.zeros((len(rows), model.config.embed_dim)), jnp.zeros(len(rows), jnp.int32)

    def propose(self, model, own, *args):
        return super().propose(model, None, *args)[0], own

    def settle(self, own, known, outcome):
        (features,) = outcome.features
        rows, at = jnp.arange(len(outcome.last)), outcome.last
        return features[rows, at], outcome.tokens[rows, at]


def test_a_drafter_may_see_the_hidden_states_of_layers():
    program, drafter = target(), Curious(length=3, least=1)
    session = Session(program.replace(decoder=Speculative(drafter)))
    session.feed([PROMPTS[0]])
    tokens = [t for new in session.decode(12, stop_ids=(), steps=lambda _: 1) for t in new[0]]
    features, token = session.told
    text = [*PROMPTS[0], *tokens]
    model = program.model
    ids = jnp.asarray([text], jnp.int32)
    _, _, (found,) = model.run_layers(model.embed(ids), model.init_cache(1, 64), jnp.asarray([len(text)]), after=(0,))
    at = len(text) - 2  # the newest token was emitted, not run
    assert int(token[0]) == text[at]
    np.testing.assert_allclose(features[0], found[0, at], atol=1e-4)


@pytest.mark.parametrize("name", ["rounded", "exit", "ngram", "lookahead"])
def test_a_step_copies_no_cache(name):
    """What a conditional changes XLA copies; a cache is changed in place."""
    program, slots = target(), 320
    decoder = Speculative(drafters()[name], adapt=True)
    decoder = Speculative(drafters()[name], adapt=True, costs=Costs(*jnp.ones((2, len(decoder.widths)))))
    cache, logits = loop.prefill(program.model, loop.empty_cache(program.model, 1, slots), PROMPTS[:1])
    state = loop.start(
        decoder, cache, logits, limit=np.array([64]), stop_ids=(), sampling=Sampling(), seeds=np.array([0]), seen=None,
        own=decoder.prepare(program.model, PROMPTS[:1], slots),
    )  # fmt: skip
    text = jax.jit(run, donate_argnums=2).lower(decoder, program.model, state, np.int32(9)).compile().as_text()
    shape = re.escape(f"f32[1,{program.config.num_kv_heads},{slots},{program.config.head_dim}]")
    assert re.search(shape, text)
    assert not re.findall(rf"= {shape}\S* copy\(", text)


@pytest.mark.measures_costs
def test_costs_are_measured_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(costs, "_memory", {})
    drafter = DraftModel(target().model, length=2)
    found = costs.costs_of(target().model, drafter, (0, 2), 1, 64)
    assert found.check[0] == 1 and found.check[1] > 0 and found.draft[0] == 0
    (kept,) = tmp_path.glob("check_costs-*.json")
    costs._memory.clear()
    monkeypatch.setattr(costs, "_measure", None)  # not called again
    again = costs.costs_of(target().model, drafter, (0, 2), 1, 64)
    np.testing.assert_array_equal(again, found)
    with pytest.raises(TypeError):  # another shape is another cost
        costs.costs_of(target().model, drafter, (0, 2), 2, 64)
    np.testing.assert_allclose(json.loads(kept.read_text())[0], found.check)


@pytest.mark.measures_costs
@pytest.mark.parametrize("cache", ["kv_paged"])
def test_costs_are_measured_in_every_cache(cache, monkeypatch):
    monkeypatch.setattr(costs, "_ROUNDS", (1, 1))
    model = apply(target(), cache).model
    found = costs.costs_of(model, DraftModel(model, length=2), (0, 2), 2, 128, anew=True)
    assert found.check[0] == 1 and (found.check > 0).all() and found.draft[1] > 0
