"""Sessions and text: what is cached is kept and changes nothing, and a stream is its text in pieces."""

import jax
import numpy as np
import pytest

from jaxinfer.decode import loop
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.generation import generate, generate_text, logits, stream_text
from jaxinfer.session import Session

A = list(range(3, 23))


def decode(session, max_new_tokens, **options):
    """Return each row's new tokens."""
    out = [[] for _ in session.rows]
    for new in session.decode(max_new_tokens, **options):
        out = [row + more for row, more in zip(out, new, strict=True)]
    return out


def check_like_fresh(session, rows, computed, **options):
    """Feed `rows` and hold logits and tokens to those of a session that has nothing cached."""
    fresh = Session(session.program, len(rows))
    assert fresh.feed(rows, **options) == sum(map(len, rows))
    assert session.feed(rows, **options) == computed
    np.testing.assert_allclose(session._logits, fresh._logits, rtol=0, atol=1e-4)
    tokens = decode(fresh, 6)
    assert decode(session, 6) == tokens
    return tokens


def test_a_session_computes_only_what_is_new(tiny):
    session = Session(tiny)
    (new,) = check_like_fresh(session, [A], computed=20, room=60)
    # The last token was drawn but never fed, so that two tokens are new.
    (new2,) = check_like_fresh(session, [[*A, *new, 7]], computed=2, room=30)
    check_like_fresh(session, [[*A, *new, 7, *new2[:3], 9, 9]], computed=2)  # diverges from its own answer
    check_like_fresh(session, [[*A[:12], 50, 51, 52]], computed=3)  # and from the prompt
    check_like_fresh(session, [[*A[:12], 50, 51, 52]], computed=1)  # the same again: one token gives the logits
    check_like_fresh(session, [A[:5]], computed=1)  # shorter
    check_like_fresh(session, [[90, 91]], computed=2)  # nothing in common
    check_like_fresh(session, [list(range(90, 30, -1)) * 5], computed=300)  # past the slots: a new cache
    assert session._slots == 512


def test_rows_of_a_session_are_kept_on_their_own(tiny):
    session = Session(tiny, 2)
    first = check_like_fresh(session, [A, A[:4]], computed=24, room=60)
    first = check_like_fresh(session, [[*A, *first[0], 8], [*A[:4], 77, 78]], computed=2 + 2)
    check_like_fresh(session, [[*A, 9, 9, 9], [*A[:4], 77, 78, *first[1][:2]]], computed=3 + 1)


def test_an_empty_row_decodes_nothing(tiny):
    session = Session(tiny, 2)
    assert session.feed([A, []], room=20) == 20
    assert [len(row) for row in decode(session, 5)] == [5, 0]
    assert session.feed([[], A]) == 20
    assert [len(row) for row in decode(session, 5)] == [0, 5]


def test_an_abandoned_decode_keeps_what_it_computed(tiny):
    session = Session(tiny)
    session.feed([A], room=40)
    running = session.decode(30, steps=lambda _: 4)
    new = next(running)[0] + next(running)[0]
    running.close()
    assert session.rows == [A + new[:-1]]
    check_like_fresh(session, [A + new], computed=1)


def test_the_host_can_end_rows(tiny):
    session = Session(tiny, 2)
    session.feed([A, A[:7]], room=40)
    free = generate(tiny, [A, A[:7]], max_new_tokens=12).tokens.tolist()
    out = [[], []]
    for new in session.decode(12, steps=lambda _: 2):
        out = [row + more for row, more in zip(out, new, strict=True)]
        if len(out[1]) >= 3:
            session.end([1])
    assert out == [free[0], free[1][:3]]


def test_a_refused_feed_leaves_the_session_as_it_was(tiny):
    session = Session(tiny)
    session.feed([A], room=20)
    with pytest.raises(InputError):
        session.feed([[*A, 96]])
    check_like_fresh(session, [[*A, 5]], computed=1)


def test_progress_is_told_every_chunk(tiny):
    session, told = Session(tiny), []
    session.feed([A], progress=told.append)
    assert told == [20]


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_long_prompt_is_fed_in_chunks(tiny, monkeypatch, chunk):
    monkeypatch.setattr(loop, "CHUNK", chunk)
    rows, told = [A * 2 + [60, 61], A[:3]], []
    _, scores = loop.prefill(tiny.model, loop.empty_cache(tiny.model, 2, 256), rows, told.append)
    monkeypatch.undo()
    _, expected = loop.prefill(tiny.model, loop.empty_cache(tiny.model, 2, 256), rows)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-4)
    assert sum(told) == 45 and len(told) == -(-42 // chunk)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling.of(1.0, 20, 0.9, repetition_penalty=1.2)], ids=["greedy", "sampled"]
)
def test_streaming_is_bit_identical_to_one_dispatch(tiny, sampling):
    def run(steps):
        session = Session(tiny, 2)
        session.feed([A, A[:7]], room=21)
        tokens = decode(session, 21, sampling=sampling, seed=3, steps=steps)
        return tokens, jax.tree.map(np.asarray, session._cache)

    whole, cache = run(lambda _: 1 << 30)
    for steps in (lambda _: 1, lambda dispatch: dispatch + 1):
        tokens, streamed = run(steps)
        assert tokens == whole
        jax.tree.map(np.testing.assert_array_equal, streamed, cache)


PROMPT = "Once upon a time"


def test_a_stream_is_its_text_in_pieces(stories):
    for options in ({}, dict(temperature=1.0, top_k=40, seed=3), dict(stop=["friend"])):
        pieces = list(stream_text(stories, PROMPT, max_new_tokens=60, **options))
        assert "".join(pieces) == generate_text(stories, PROMPT, 60, **options)
        assert len(pieces) > 4 and all(pieces)


def test_text_of_a_batch_is_each_text(stories):
    prompts = [PROMPT, "Lily and", "The big dog was so"]
    together = generate_text(stories, prompts, 40)
    assert together == [generate_text(stories, p, 40) for p in prompts]
    assert "there was" in together[0]  # it speaks: the model, the tokenizer and the loop fit together


def test_text_ends_before_a_stop_string_wherever_tokens_end(stories):
    whole = generate_text(stories, PROMPT, 60)
    ids = stories.tokenizer.encode(whole, add_special=False)
    starts = range(5, min(len(whole), 100), 9)
    crossing = [whole[at : at + width] for at in starts for width in (1, 4, 11)]
    assert len(ids) < len(whole)  # so that strings of several characters do cross tokens
    for stop in crossing:
        found = generate_text(stories, PROMPT, 60, stop=[stop])
        assert found == whole[: whole.index(stop)], stop
    both = [whole[30:33], whole[12:16]]  # the first in the text wins, not the first in the list
    assert generate_text(stories, PROMPT, 60, stop=both) == whole[: min(whole.index(s) for s in both)]
    assert generate_text(stories, PROMPT, 60, stop=["never in a story"]) == whole
    assert generate_text(stories, [PROMPT, PROMPT], 60, stop=[crossing[2]]) == [whole[: whole.index(crossing[2])]] * 2


@pytest.mark.parametrize("stop", ["word", [""], ["a", ""]], ids=str)
def test_bad_stop_strings_are_refused(stories, stop):
    with pytest.raises(InputError, match="stop="):
        generate_text(stories, PROMPT, 5, stop=stop)


def test_an_interrupt_in_the_middle_of_a_dispatch_loses_the_cache_and_nothing_else(tiny, monkeypatch):
    session = Session(tiny)
    session.feed([[1, 2, 3]], room=8)
    answer = session.decode(8, steps=lambda _: 2)
    next(answer)
    advance = loop.advance

    def interrupted(*args):
        advance(*args)  # the state is donated, and what came of it never arrives
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    monkeypatch.undo()
    assert session.feed([[1, 2, 3]], room=8) == 3
    again = [t for (new,) in session.decode(8) for t in new]
    assert again == generate(tiny, [[1, 2, 3]], max_new_tokens=8).tokens[0].tolist()


def test_decoding_past_the_room_that_was_asked_for_grows_the_cache(tiny):
    prompt = [int(t) for t in np.arange(250) % 90]
    session = Session(tiny)
    session.feed([prompt])  # 256 slots, of which 6 are free
    out = [t for (new,) in session.decode(40) for t in new]
    assert out == generate(tiny, [prompt], max_new_tokens=40).tokens[0].tolist()


def test_misuse_of_a_session_is_told_in_one_line(tiny):
    session = Session(tiny, 2)
    with pytest.raises(InputError, match="call feed before"):
        next(session.decode(4))
    with pytest.raises(InputError, match="1 rows: this session has 2"):
        session.feed([[1]])
    session.feed([[1], [2]], room=4)
    with pytest.raises(InputError, match="seed has 3 values"):
        next(session.decode(4, seed=[1, 2, 3]))
    list(session.decode(4))
    with pytest.raises(InputError, match="call feed before"):
        next(session.decode(4))
    with pytest.raises(InputError, match="token 200: must be in"):
        logits(tiny, np.array([[1, 200]]))
