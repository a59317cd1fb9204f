"""Speculative decoding gives what the target gives: the same tokens when greedy, and the same law when sampled."""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_program, tiny_config
from scipy import stats
from test_decode import compilations

from jaxinfer.decode import loop
from jaxinfer.decode.drafters.datastore import Datastore
from jaxinfer.decode.drafters.exit import Exit
from jaxinfer.decode.drafters.lookahead import Lookahead
from jaxinfer.decode.drafters.model import DraftModel
from jaxinfer.decode.drafters.ngram import NGram
from jaxinfer.decode.sampling import Sampling
from jaxinfer.decode.speculative import Speculative
from jaxinfer.errors import InputError
from jaxinfer.generation import generate, logits
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.session import Session
from jaxinfer.speculation import speculative
from jaxinfer.text.tokenizer import Tokenizer

PROMPTS = [[3, 4, 5, 6, 3, 4, 5], [9], list(range(3, 43)), [7, 8] * 7]
CACHES = {
    "dense": (), "kv_int8": ("kv_int8",), "kv_fp8": ("kv_fp8",), "kv_int4": ("kv_int4:group=8,residual=16",),
    "kv_window": ("kv_window:sinks=2,window=9",)}  # fmt: skip
NAMES = ("itself", "rounded", "short_cache", "windowed", "random", "ngram", "exit", "datastore", "lookahead")


CORPUS = (np.arange(500) ** 2 * 7 % 96).tolist()


@functools.cache
def target(cache: str = "dense") -> Program:
    return apply(random_program(tiny_config()), *CACHES[cache])


@functools.cache
def drafters() -> dict[str, object]:
    """Return drafters that are always right, often, and hardly ever."""
    program = target()
    other = random_program(tiny_config(num_layers=1, windows=(None,)), seed=5)
    return {
        "itself": DraftModel(program.model, length=3),
        "rounded": DraftModel(apply(program, "int8").model, length=4),
        "short_cache": DraftModel(apply(program, "kv_int4:group=4,residual=0").model, length=1),
        "windowed": DraftModel(apply(program, "kv_window:sinks=1,window=6").model, length=4),
        "random": DraftModel(other.model, length=5),
        "ngram": NGram(least=1, length=6),
        "exit": Exit(layers=1, length=3),
        "datastore": Datastore.of(CORPUS, length=2, branches=3, least=1),
        "lookahead": Lookahead(window=2, levels=2, drafts=2),
    }


def speculate(program: Program, drafter: object, **options) -> Program:
    return program.replace(decoder=Speculative(drafter, **options))


@pytest.mark.parametrize(
    ("name", "cache", "penalty"),
    [
        *itertools.product(NAMES, ["dense"], [1.0]),
        *itertools.product(["rounded", "exit", "lookahead"], list(CACHES)[1:], [1.0]),
        *itertools.product(["rounded", "exit", "datastore"], ["dense"], [1.3]),
    ],
)
def test_greedy_gives_the_targets_tokens(name, cache, penalty):
    program = target(cache)
    options = dict(max_new_tokens=50, stop_ids=(), repetition_penalty=penalty)
    expected = generate(program, PROMPTS, **options)
    found = generate(speculate(program, drafters()[name]), PROMPTS, **options)
    for row in np.flatnonzero((found.tokens != expected.tokens).any(axis=1)):  # a tie, or an error: the scores tell
        first = int((found.tokens[row] != expected.tokens[row]).argmax())
        text = [*PROMPTS[row], *expected.tokens[row, :first].tolist()]
        scores = np.asarray(logits(program, jnp.asarray([text])))[0, -1]
        gap = abs(scores[found.tokens[row, first]] - scores[expected.tokens[row, first]])
        assert gap <= 1e-3, f"row {row}, token {first}: the two tokens' scores differ by {gap}"


@pytest.mark.parametrize("name", ["rounded", "exit", "datastore", "lookahead"])
def test_samples_are_the_tokens_that_the_target_alone_would_draw(name):
    """By the verifier "coupled": for the same seed, whatever is drafted."""
    options = dict(max_new_tokens=40, temperature=1.2, top_k=20, stop_ids=())
    expected = generate(target(), PROMPTS, seed=[1, 2, 3, 4], **options)
    fast = speculate(target(), drafters()[name])
    np.testing.assert_array_equal(generate(fast, PROMPTS, seed=[1, 2, 3, 4], **options).tokens, expected.tokens)


@pytest.mark.parametrize("name", ["short_cache", "ngram", "exit", "lookahead"])
def test_limits_and_stops_are_those_of_plain_decoding(name):
    program = target()
    fast = speculate(program, drafters()[name])
    free = generate(program, PROMPTS, max_new_tokens=20, stop_ids=())
    stop = int(free.tokens[2, 4])
    for options in (dict(max_new_tokens=1), dict(max_new_tokens=2), dict(max_new_tokens=20, stop_ids=[stop])):
        expected, found = (generate(p, PROMPTS, **{"stop_ids": (), **options}) for p in (program, fast))
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert found.lengths.tolist() == expected.lengths.tolist() and found.stopped == expected.stopped


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("verifier", ["rejection", "block"])
def test_a_draft_that_is_the_target_is_kept_whole(verifier, temperature):
    length, steps = 3, 6
    program = speculate(target(), DraftModel(target().model, length=length), verifier=verifier)
    session = Session(program, len(PROMPTS))
    session.feed(PROMPTS)
    new = 1 + steps * (length + 1)
    sampling = Sampling.of(temperature=temperature)
    assert sum(len(x[0]) for x in session.decode(new, stop_ids=(), sampling=sampling)) == new
    assert session.steps == [steps] * len(PROMPTS)


def test_rows_do_not_depend_on_their_batch():
    program = speculate(target(), drafters()["rounded"], verifier="block")
    options = dict(max_new_tokens=24, temperature=0.9, top_k=30, top_p=0.95, stop_ids=())
    together = generate(program, PROMPTS, seed=[4, 5, 6, 7], **options)
    for row in (0, 2):
        alone = generate(program, [PROMPTS[row]], seed=[4 + row], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize("name", ["rounded", "ngram"])
def test_a_session_goes_on_after_it(name):
    session, plain = (Session(p) for p in (speculate(target(), drafters()[name]), target()))
    row = PROMPTS[0]
    for _ in range(3):
        answers = []
        for s in (session, plain):
            s.feed([row])
            answers.append([t for new in s.decode(9, stop_ids=()) for t in new[0]])
        assert answers[0] == answers[1]
        assert session.rows == plain.rows
        row = [*row, *answers[0], 11, 12]


def test_any_program_or_drafter_is_a_draft(stories):
    options = dict(max_new_tokens=40, stop_ids=())
    rows = [stories.tokenizer.encode(text) for text in ("Once upon a time", "Tom and Tom and")]
    expected = generate(stories, rows, **options).tokens
    for draft, length in ((apply(stories, "int8"), 5), ("ngram", 3), (NGram(least=1), None)):
        program = speculative(stories, draft, length=length, verifier="rejection", adapt=False)
        assert program.decoder.verifier == "rejection" and program.decoder.lookahead == (length or 7)
        np.testing.assert_array_equal(generate(program, rows, **options).tokens, expected)
    other = stories.replace(tokenizer=_Other())
    with pytest.raises(InputError, match=r"token 0 is .* and 'x' in the draft: a draft must have the same"):
        speculative(stories, other)


class _Other(Tokenizer):
    """Every token is x."""

    def __init__(self):
        pass

    def decode(self, ids, skip_special=True):
        return "x"


def test_nothing_is_compiled_twice():
    program = speculate(target(), drafters()["rounded"])
    generate(program, PROMPTS, max_new_tokens=8)
    with compilations() as found:
        generate(program, [p[::-1] for p in PROMPTS], max_new_tokens=8, seed=3)
    assert not found


def law_of(program: Program, prompt: list[int], depth: int, sampling: dict) -> dict[tuple[int, ...], float]:
    """Return the probability of the outputs whose own is above 1e-5, by enumeration."""
    draws, found = Sampling.of(**sampling), {(): 1.0}
    for _ in range(depth):
        scores = np.asarray(logits(program, jnp.asarray([prompt + list(x) for x in found])))[:, -1]
        laws = np.asarray(jax.nn.softmax(draws.adjust(jnp.asarray(scores), None), axis=1), np.float64)
        found = {
            (*x, y): p * law[y]
            for (x, p), law in zip(found.items(), laws, strict=True)
            for y in np.flatnonzero(p * law > 1e-5).tolist()
        }
    return found


def by_generate(program: Program, prompt: list[int], depth: int, sampling: dict, seeds: range) -> np.ndarray:
    """Return the first `depth` tokens of a row for each seed. A draft is as long where two tokens more may follow."""
    options = dict(max_new_tokens=depth + 2, seed=seeds.start, stop_ids=(), **sampling)
    return generate(program, [prompt] * len(seeds), **options).tokens[:, :depth]


def by_steps(
    program: Program, prompt: list[int], depth: int, sampling: dict, batch: int
) -> Callable[[range], np.ndarray]:
    """Return `by_generate` for many batches: of the same steps, but the prompt is computed once, in a small cache.

    Each step gives a token or more: no row needs more steps than tokens, and the first token comes before them.
    """
    model, decoder, rows, slots = program.model, program.decoder, [prompt] * batch, 16
    assert len(prompt) + depth + 2 + decoder.lookahead <= slots
    cache, scores = loop.prefill(model, loop.empty_cache(model, batch, slots), rows)
    own = decoder.prepare(model, rows, slots)
    options = dict(limit=np.full(batch, depth + 2), stop_ids=(), sampling=Sampling.of(**sampling), seen=None)

    def draw(seeds: range) -> np.ndarray:
        mine = jax.tree.map(jnp.copy, (cache, own))  # what is stepped is given away
        state = loop.start(decoder, mine[0], scores, seeds=np.array(seeds), own=mine[1], **options)
        state = loop.advance(decoder, model, state, np.int32(depth - 1))
        assert int(state.emitted.min()) >= depth
        return np.asarray(state.tokens)[:, :depth]

    return draw


def assert_samples_have_law(
    draw: Callable[[range], np.ndarray], law: dict[tuple[int, ...], float], count: int, batch: int
) -> None:
    """Chi-square of the first tokens of `count` samples; outcomes that are expected less than 10 times count as one."""
    seen: dict[tuple[int, ...], int] = {}
    for i in range(0, count, batch):
        for x, n in zip(*np.unique(draw(range(i, i + batch)), axis=0, return_counts=True), strict=True):
            seen[tuple(x.tolist())] = seen.get(tuple(x.tolist()), 0) + int(n)
    assert sum(seen.values()) == count
    cells = [x for x, p in law.items() if p * count >= 10]
    observed, expected = [seen.get(x, 0) for x in cells], [law[x] * count for x in cells]
    rest = count - sum(expected)
    if rest > 1:
        observed, expected = [*observed, count - sum(observed)], [*expected, rest]
    else:
        assert sum(observed) == count
        expected = [x * count / sum(expected) for x in expected]
    assert len(cells) > 5
    assert stats.chisquare(observed, expected).pvalue > 1e-4


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "verifier", "sampling"),
    [
        *itertools.product(["rounded", "random"], ["rejection", "block"], [{"temperature": 1.0}]),
        ("random", "block", {"temperature": 1.3, "top_k": 3}),
        ("ngram", "block", {"temperature": 0.8, "min_p": 0.1}),
        ("ngram", "rejection", {"temperature": 1.0}),
        ("datastore", "rejection", {"temperature": 1.0}),  # a tree
        ("exit", "block", {"temperature": 1.0}),
    ],
)
def test_samples_have_the_targets_law(name, verifier, sampling):
    """Of all outputs of three tokens of five: exact, by enumeration of the target."""
    program = random_program(tiny_config(vocab_size=5))
    other = random_program(tiny_config(vocab_size=5, num_layers=1, windows=(None,)), seed=5)
    drafter = {
        "rounded": DraftModel(apply(program, "int8").model, length=2),
        "random": DraftModel(other.model, length=3),
        "ngram": NGram(length=3, least=1),
        "datastore": Datastore.of([x % 5 for x in CORPUS], length=2, branches=2, least=1),
        "exit": Exit(layers=1, length=2),
    }[name]
    prompt = [1, 2, 3, 1, 2]
    fast = speculate(program, drafter, verifier=verifier)
    draw = functools.partial(by_generate, fast, prompt, 3, sampling)
    assert_samples_have_law(draw, law_of(program, prompt, 3, sampling), 8_000, batch=2000)


@pytest.mark.optimized
@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}], ids=str)
def test_samples_of_a_trained_model_have_its_law(stories, sampling):
    fast = speculate(stories, DraftModel(apply(stories, "int4:group=43").model, length=3), verifier="block")
    prompt = stories.tokenizer.encode("He")
    draw = by_steps(fast, prompt, 3, sampling, batch=200)
    np.testing.assert_array_equal(draw(range(200)), by_generate(fast, prompt, 3, sampling, range(200)))
    assert_samples_have_law(draw, law_of(stories, prompt, 3, sampling), 100_000, batch=200)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NGram(least=3, most=2), "least=3, most=2"),
        (lambda: Lookahead(window=0), "window=0"),
        (lambda: Datastore.of([3]), "a datastore of 1 tokens: must be at least 2"),
        (lambda: generate(speculate(target(), Exit(layers=2)), [[1]]), "layers=2: must be below the model's 2"),
        (lambda: speculative(target(), "ngram:lenght=3"), "ngram has no option 'lenght'.*length"),
        (lambda: speculative(target(), "exit"), "exit: needs layers="),
        (lambda: speculative(target(), "self"), "self: needs passes="),
        (lambda: speculative(target(), "datastore:length=3"), "datastore: needs file="),
        (lambda: DraftModel(target().model, length=0), "length=0"),
        (lambda: speculative(target(), "ngrm"), "no drafter 'ngrm'.*ngram"),
        (lambda: speculative(target(), verifier="blok"), "verifier='blok'"),
        (lambda: speculative(target(), NGram(), length=3), "length=3: the drafter has its own"),
        (lambda: speculative(target(), random_program(tiny_config(vocab_size=5))), "the draft has 5 tokens"),
        (
            lambda: generate(speculate(target("kv_int4"), NGram(length=60)), [[1] * 40], max_new_tokens=250),
            "drafts of 60 tokens: the cache can only be rewound by",
        ),
        (
            lambda: generate(
                speculate(target(), DraftModel(target("kv_int4").model, length=60)), [[1] * 40], max_new_tokens=250
            ),
            "the draft's cache can only be rewound by",
        ),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
