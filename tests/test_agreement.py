"""Agreement with a baseline: zero against itself, the textbook value on a known pair, whatever the windows."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.eval import agreement
from jaxinfer.eval.agreement import Reference
from jaxinfer.eval.perplexity import score_text


def draw(n, vocab=96, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n).tolist()


def direct(program, windows):
    """Return every window's log-probabilities, [T, V], in float64."""
    logits = [np.asarray(ji.logits(program, np.array([w[:-1]])), np.float64)[0] for w in windows]
    norms = [x.max(-1, keepdims=True) for x in logits]
    return [x - m - np.log(np.exp(x - m).sum(-1, keepdims=True)) for x, m in zip(logits, norms, strict=True)]


@pytest.fixture(scope="module")
def near(tiny):
    """Return a program a little off `tiny`."""
    model = jax.tree.map(lambda x: x * 1.02 if x.ndim > 1 else x, tiny.model)
    return dataclasses.replace(tiny, model=model)


def test_a_program_agrees_with_itself_exactly(tiny):
    tokens = draw(150)
    found = Reference(tiny, tokens, window=64, batch_size=2).compare(tiny)
    assert (found.kl.value, found.kl.stderr, found.top1.value, found.extra_nats.value) == (0.0, 0.0, 1.0, 0.0)
    want = score_text(tiny, tokens, window=64)
    assert found.tokens == want.tokens_scored == 147
    assert found.perplexity.value == pytest.approx(want.value, rel=1e-6)
    assert found.perplexity.stderr == pytest.approx(want.stderr, rel=1e-4)


def test_it_is_the_direct_computation(tiny, near):
    tokens = draw(97)
    windows = [tokens[:32], tokens[32:64], tokens[64:96]]  # the 97th is alone in its window: not predicted
    logp, logq = direct(tiny, windows), direct(near, windows)
    kl = [(np.exp(p) * (p - q)).sum() for p, q in zip(logp, logq, strict=True)]
    same = [(p.argmax(-1) == q.argmax(-1)).sum() for p, q in zip(logp, logq, strict=True)]
    nats = [-sum(q[t, w[t + 1]] for t in range(31)) for q, w in zip(logq, windows, strict=True)]
    base = [-sum(p[t, w[t + 1]] for t in range(31)) for p, w in zip(logp, windows, strict=True)]
    found = Reference(tiny, tokens, window=32, batch_size=2).compare(near)
    assert found.kl.value == pytest.approx(sum(kl) / 93, rel=1e-4) and found.kl.value > 1e-3
    assert found.top1.value == pytest.approx(sum(same) / 93) and found.top1.value < 1
    assert found.nats.value == pytest.approx(sum(nats) / 93, rel=1e-5)
    assert found.extra_nats.value == pytest.approx((sum(nats) - sum(base)) / 93, abs=1e-5)
    assert found.kl.stderr == pytest.approx(np.std(np.array(kl) / 31, ddof=1) / math.sqrt(3), rel=1e-3)
    assert found.extra_nats.stderr == pytest.approx(
        np.std((np.array(nats) - base) / 31, ddof=1) / math.sqrt(3), rel=1e-2
    )


def test_kl_of_a_hand_made_pair():
    """One model's logits are 0, so p is uniform; the other's are the same for every context: q is known."""
    config = tiny_config(vocab_size=4, tie_embeddings=False)
    program = random_program(config)
    V, D = config.vocab_size, config.embed_dim
    q = np.array([0.5, 0.25, 0.125, 0.125])

    def with_logits(values):
        model = jax.tree.map(lambda x: x, program.model)
        model.final_norm.scale = np.zeros(D, np.float32)  # every hidden state becomes 0 ...
        model.unembed.bias = np.asarray(values, np.float32)  # ... so that the bias is the logits
        return program.replace(model=model)

    uniform, known = with_logits(np.zeros(V)), with_logits(np.log(q))
    tokens = [0, 1, 2, 3, 0]
    found = Reference(uniform, tokens).compare(known)
    assert found.kl.value == pytest.approx(np.mean(np.log(0.25 / q)), rel=1e-6)
    assert found.nats.value == pytest.approx(-np.log(q[tokens[1:]]).mean(), rel=1e-6)
    assert found.top1.value == 1.0 and math.isnan(found.kl.stderr)  # one window has no spread
    assert Reference(known, tokens).compare(uniform).kl.value == pytest.approx((q * np.log(q / 0.25)).sum(), rel=1e-6)


def test_batches_chunks_and_blocks_change_nothing(tiny, near, monkeypatch):
    tokens = draw(330)
    want = Reference(tiny, tokens, window=100, batch_size=4).compare(near)
    monkeypatch.setattr(agreement, "_LOGITS", 96 * 3 * 7)
    monkeypatch.setattr("jaxinfer.decode.loop.CHUNK", 64)
    jax.clear_caches()  # the block's size is read when the comparison is traced
    got = Reference(tiny, tokens, window=100, batch_size=3).compare(near)
    for name in ("kl", "top1", "nats"):
        assert getattr(got, name).value == pytest.approx(getattr(want, name).value, rel=1e-4)


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        ([1], {}, "needs 2 or more"),
        ([1, 96], {}, "token 96: must be in 0..95"),
        ([1, 2], {"window": 1}, "window=1: must be in 2..512"),
        ([1, 2], {"batch_size": 0}, "batch_size=0: must be 1 or more"),
    ],
)
def test_bad_texts_are_refused(tiny, tokens, options, message):
    with pytest.raises(InputError, match=message):
        Reference(tiny, tokens, **options)


def test_another_vocabulary_is_refused(tiny):
    other = random_program(tiny_config(vocab_size=64))
    with pytest.raises(InputError, match="a vocabulary of 64 tokens: must be the baseline's, which has 96"):
        Reference(tiny, [1, 2, 3]).compare(other)
