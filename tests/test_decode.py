"""The laws of decoding: rows ignore their batch, limits and stops hold, nothing recompiles, caches are donated."""

import contextlib

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model, random_program, tiny_config, tiny_moe

from jaxinfer.decode import loop
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.generation import generate, logits
from jaxinfer.models.transformer import abstract
from jaxinfer.session import Session

SAMPLED = dict(temperature=0.9, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
PROMPTS = [list(range(3, 3 + n)) for n in (9, 1, 40, 14)]


@contextlib.contextmanager
def compilations():
    """Yield a list that gets an entry for every program that XLA is asked for."""
    found: list[float] = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("which", "options"),
    [("tiny", {}), ("tiny", SAMPLED), ("tiny_experts", SAMPLED)],
    ids=["greedy", "sampled", "experts"],
)
def test_rows_are_independent_of_their_batch(which, options, request):
    program = request.getfixturevalue(which)
    prompts = PROMPTS if which == "tiny" else PROMPTS[:2]
    seeds = [11, 2, 30, 4][: len(prompts)]
    together = generate(program, prompts, max_new_tokens=20, seed=seeds, **options)
    reordered = generate(program, prompts[::-1], max_new_tokens=20, seed=seeds[::-1], **options)
    for row, prompt in enumerate(prompts):
        alone = generate(program, [prompt], max_new_tokens=20, seed=[seeds[row]], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
    np.testing.assert_array_equal(reordered.tokens, together.tokens[::-1])


def test_greedy_is_the_argmax_of_the_whole_sequence(tiny):
    row = list(PROMPTS[0])
    found = generate(tiny, [row], max_new_tokens=6).tokens[0]
    scores = np.asarray(logits(tiny, jnp.asarray([row + found.tolist()])))[0]
    np.testing.assert_array_equal(found, scores[len(row) - 1 : -1].argmax(-1))


def test_seeds_reproduce_and_differ(tiny):
    def draw(seed):
        return generate(tiny, [PROMPTS[0]] * 4, max_new_tokens=12, seed=seed, temperature=1.0).tokens

    first = draw(5)
    np.testing.assert_array_equal(first, draw(5))
    np.testing.assert_array_equal(first, draw([5, 6, 7, 8]))  # one number counts up over the rows
    assert (first[0] != first[1]).any()
    np.testing.assert_array_equal(first[1:], draw(6)[:3])
    assert draw(-1).shape == draw(2**40).shape == (4, 12)  # any whole number is a seed


def test_limits_and_stops(tiny):
    free = generate(tiny, PROMPTS, max_new_tokens=12, stop_ids=())
    assert free.lengths.tolist() == [12] * 4 and free.stopped == [False] * 4
    stop = int(free.tokens[2, 4])
    out = generate(tiny, PROMPTS, max_new_tokens=12, stop_ids=[stop])
    for row in range(4):
        path = free.tokens[row].tolist()
        expected = path[: path.index(stop) + 1] if stop in path else path
        assert out.tokens[row, : out.lengths[row]].tolist() == expected  # the stop token is part of the output
        assert not out.tokens[row, out.lengths[row] :].any()
        assert out.stopped[row] == (stop in path)
    own = generate(tiny.replace(stop_ids=(stop,)), PROMPTS, max_new_tokens=12)
    np.testing.assert_array_equal(own.tokens, out.tokens)
    for limit in (1, 2):  # the first token comes from the prefill, the second from a step
        few = generate(tiny, PROMPTS, max_new_tokens=limit)
        np.testing.assert_array_equal(few.tokens, free.tokens[:, :limit])


def test_lengths_cut_the_rows(tiny):
    padded = np.zeros((4, 40), np.int32)
    for row, prompt in enumerate(PROMPTS):
        padded[row, : len(prompt)] = prompt
    lengths = [len(p) for p in PROMPTS]
    expected = generate(tiny, PROMPTS, max_new_tokens=5).tokens
    for tokens in (padded, jnp.asarray(padded), padded.tolist()):
        np.testing.assert_array_equal(generate(tiny, tokens, lengths, max_new_tokens=5).tokens, expected)


def test_each_row_has_its_own_limit(tiny):
    session = Session(tiny, 4)
    session.feed(PROMPTS, room=9)
    out: list[list[int]] = [[] for _ in PROMPTS]
    for new in session.decode([3, 0, 9, 1], steps=lambda _: 2):
        out = [row + more for row, more in zip(out, new, strict=True)]
    expected = generate(tiny, PROMPTS, max_new_tokens=9).tokens
    assert out == [expected[row, :limit].tolist() for row, limit in enumerate([3, 0, 9, 1])]


def test_the_context_is_the_limit(tiny):
    context = tiny.config.max_context
    full = (list(range(3, 90)) * 6)[:context]
    long = full[:-3]
    out = generate(tiny, [long, PROMPTS[0]], max_new_tokens=10)
    assert out.lengths.tolist() == [3, 10] and out.stopped == [False, False]
    scores = np.asarray(logits(tiny, jnp.asarray([long + out.tokens[0, :3].tolist()])))[0]
    np.testing.assert_array_equal(out.tokens[0, :3], scores[-4:-1].argmax(-1))
    assert generate(tiny, [full[:-1]], max_new_tokens=10).lengths.tolist() == [1]
    with pytest.raises(InputError, match=f"{context}"):
        generate(tiny, [full], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "no prompts"),
        ([[]], {}, "prompt is empty"),
        ([[3], []], {}, "prompt 1 is empty"),
        ([[3]], dict(max_new_tokens=0), "max_new_tokens=0"),
        ([[96]], {}, "token 96"),
        ([[3, -1]], {}, "token -1"),
    ],
    ids=str,
)
def test_bad_prompts_are_refused(tiny, prompts, options, message):
    with pytest.raises(InputError, match=message):
        generate(tiny, prompts, **options)


def test_nothing_recompiles_within_a_bucket(tiny):
    def run(lengths, seed, max_new_tokens, **options):
        prompts = [list(range(2, 2 + n)) for n in lengths]
        return generate(tiny, prompts, seed=seed, max_new_tokens=max_new_tokens, **options)

    run((3, 40, 9, 1), 0, 10)
    run((3, 40, 9, 1), 0, 10, **SAMPLED)
    with compilations() as compiled:
        run((64, 9, 1, 2), 1, 33)
        run((33, 33, 33, 33), 12345, 1)
        run((16, 50, 7, 1), 1, 7, temperature=0.2, top_k=3, top_p=0.5, min_p=0.2, repetition_penalty=1.7)
        run((5, 5, 5, 60), [9] * 4, 64, temperature=3.0, top_k=90, top_p=0.1, min_p=0.001, repetition_penalty=0.9)
    assert compiled == []
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(0)
    assert len(compiled) == 1  # the counter counts


def test_caches_are_donated(tiny):
    """No dispatch keeps two caches: the old buffers are gone, and what can be updated in place is."""
    model = tiny.model

    def leaves(tree):
        return [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]

    cache = loop.empty_cache(model, 2, 256)
    rewound = loop.rewind(cache, np.zeros(2, np.int32))
    filled, scores = loop.prefill(model, rewound, [[3, 4], [5]])
    where = {x.unsafe_buffer_pointer() for layer in filled.layers for x in leaves(layer)}
    limit = np.array([8, 8])
    options = dict(limit=limit, stop_ids=(), sampling=Sampling(), seeds=np.arange(2), seen=None)
    started = loop.start(tiny.decoder, filled, scores, **options)
    advanced = loop.advance(tiny.decoder, model, started, np.int32(3))
    finished = loop.finish(advanced, np.array([True, False]))
    for given in (cache, rewound, filled):
        assert all(x.is_deleted() for layer in given.layers for x in leaves(layer))
    for given in (started, advanced):
        assert all(x.is_deleted() for x in leaves(given.cache)) and given.tokens.is_deleted()
    assert {x.unsafe_buffer_pointer() for layer in finished.cache.layers for x in leaves(layer)} == where
    assert not any(x.is_deleted() for x in leaves(model))
    assert finished.done.tolist() == [True, False] and finished.emitted.tolist() == [4, 4]


CONFIGS = {
    "tiny": {},
    "untied, biased": dict(tie_embeddings=False, qkv_bias=True, out_bias=True, mlp_bias=True),
    "gemma": dict(qk_norm=True, post_norms=True, embed_scale=5.6, attention_softcap=50.0, final_softcap=30.0),
    "experts": dict(moe=tiny_moe()),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_abstract_model_gives_the_shapes_of_the_real_one(name, dtype):
    config = tiny_config(**CONFIGS[name])
    real = jax.tree.map(lambda x: x if x.ndim < 2 else x.astype(dtype), random_model(config))
    real = jax.tree.map(lambda x, a: x.astype(a.dtype), real, abstract(config, dtype))

    def forward(model, tokens, counts):
        hidden, cache = model(tokens, model.init_cache(2, 16), counts)
        return model.logits(hidden), cache

    inputs = (jnp.ones((2, 3), jnp.int32), jnp.array([3, 1]))
    shapes = jax.eval_shape(forward, abstract(config, dtype), *inputs)
    found = jax.jit(forward)(real, *inputs)
    assert jax.tree.structure(shapes) == jax.tree.structure(found)
    for shape, array in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
    assert found[0].dtype == jnp.float32 and found[1].layers[0].k.dtype == dtype


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 13])
def test_experts_equal_a_dense_loop(tokens, k, normalize):
    config = tiny_config(moe=tiny_moe(experts_per_token=k, normalize_weights=normalize))
    moe = random_model(config).layers[1].mlp
    x = jax.random.normal(jax.random.key(9), (2, tokens, 32)) + 2.0  # a common part: some experts get no token
    flat = np.asarray(x, np.float64).reshape(-1, 32)
    router, gate, up, down = (np.asarray(p.kernel, np.float64) for p in (moe.router, moe.gate, moe.up, moe.down))
    scores = np.exp(flat @ router - (flat @ router).max(-1, keepdims=True))
    weights = scores / scores.sum(-1, keepdims=True)
    chosen = np.argsort(-weights, axis=-1)[:, :k]
    mask = np.zeros_like(weights)
    np.put_along_axis(mask, chosen, 1, axis=-1)
    weights = weights * mask
    if normalize:
        weights /= weights.sum(-1, keepdims=True)
    expected = np.zeros_like(flat)
    for e in range(4):
        wide = flat @ gate[e]
        expected += weights[:, e : e + 1] * ((wide / (1 + np.exp(-wide)) * (flat @ up[e])) @ down[e])
    np.testing.assert_allclose(np.asarray(moe(x)).reshape(-1, 32), expected, rtol=1e-4, atol=1e-3)


def test_a_program_without_a_tokenizer_says_so():
    from jaxinfer.generation import generate_text

    with pytest.raises(InputError, match="no tokenizer"):
        generate_text(random_program(tiny_config()), "x")


@pytest.mark.parametrize("text", ["x", ["x"]])
def test_text_for_ids_is_refused_by_the_name_of_what_takes_it(tiny, text):
    unchecked = getattr(generate, "__wrapped__", generate)  # users run without the checks of types
    with pytest.raises(InputError, match="call generate_text"):
        unchecked(tiny, text)
