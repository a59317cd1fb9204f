"""Forks: branches on a shared prefix write what each would write alone, share what they can, and join into one row."""

import functools

import jax
import numpy as np
import pytest
from models import random_program, tiny_config

from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.generation import generate
from jaxinfer.ops.quantized import nbytes
from jaxinfer.passes import apply
from jaxinfer.session import Session
from jaxinfer.speculation import speculative

PREFIX = [int(t) for t in np.arange(75) * 7 % 96]
SUFFIXES = [[5, 6, 7], [9], []]
CACHES = {
    "dense": (), "kv_int8": ("kv_int8",), "kv_fp8": ("kv_fp8",), "kv_int4": ("kv_int4:group=8,residual=16",),
    "kv_paged": ("kv_paged:page=8",), "kv_paged_int8": ("kv_paged:page=16,store=int8",),
    "kv_window": ("kv_window:sinks=2,window=9",),
    "kv_paged_int4": ("kv_paged:page=16,store=int4,group=8,residual=16",),
}  # fmt: skip


@functools.cache
def program(cache: str):
    return apply(random_program(tiny_config(num_layers=1, windows=(), head_dim=16)), *CACHES[cache])


def decode(session, count, **options):
    out = [[] for _ in session.rows]
    for new in session.decode(count, **options):
        out = [row + more for row, more in zip(out, new, strict=True)]
    return out


def alone(program, row, count, **options):
    return generate(program, [row], max_new_tokens=count, **options).tokens[0].tolist()


@pytest.mark.parametrize("cache", CACHES)
def test_branches_write_what_rows_write_that_were_fed_whole(cache):
    """Sampled, each row by its own seed; that a row of a batch writes what it does alone is another law."""
    ours, seeds, session = program(cache), [11, 5, 8], Session(program(cache))
    session.feed([PREFIX], room=60)
    branches = session.fork(SUFFIXES, room=12)
    found = decode(branches, 12, sampling=Sampling.of(temperature=1.0), seed=seeds)
    rows = [PREFIX + suffix for suffix in SUFFIXES]
    assert found == generate(ours, rows, max_new_tokens=12, temperature=1.0, seed=seeds).tokens.tolist()
    assert session.rows == [[]]
    assert branches.rows == [row + tokens[:-1] for row, tokens in zip(rows, found, strict=True)]


@pytest.mark.parametrize("cache", ["kv_int4", "kv_paged", "kv_paged_int4"])
def test_branches_of_branches_write_what_each_would_alone_and_join_into_one_row(cache):
    """Greedily; the joined row then goes on like any other."""
    ours, session = program(cache), Session(program(cache))
    session.feed([PREFIX], room=60)
    branches = session.fork([[5, 6], [9]], room=12)
    before = list(branches.rows)  # decoding makes them longer
    rows = [row + tokens for row, tokens in zip(before, decode(branches, 6), strict=True)]
    deeper = branches.fork([rows[0][-1:], [*rows[1][-1:], 2, 3], []], room=12, of=[0, 1, 1])
    rows = [rows[0], [*rows[1], 2, 3], rows[1][:-1]]
    found = decode(deeper, 12)
    assert found == [alone(ours, row, 12) for row in rows]
    joined = rows[0] + found[0] + rows[1][len(PREFIX) :] + found[1]
    session.join(deeper, joined, room=12)
    assert decode(session, 12) == [alone(ours, joined, 12)] and deeper.rows == [[], [], []]


def test_only_what_the_other_branches_wrote_is_computed_for_a_join():
    session = Session(program("dense"))
    session.feed([PREFIX], room=60)
    branches = session.fork([[5], [6]], room=12)
    first, other = decode(branches, 12)
    # The last token that the first branch drew was not fed.
    assert session.join(branches, [*PREFIX, 5, *first, 6, *other]) == 1 + 1 + len(other)


def test_a_fork_in_pages_holds_its_prefix_once():
    """Counted in bytes of the buffers: the pages of the parent, and for each branch those of its own tokens."""
    sizes = {}
    for cache in ("dense", "kv_paged"):
        session = Session(program(cache))
        session.feed([PREFIX * 5], room=100)  # 512 slots
        before = nbytes(session._cache)
        sizes[cache] = before, nbytes(session.fork([[t] for t in range(8)], room=40)._cache)
    before, after = sizes["dense"]
    assert after == 8 * before
    page = 8 * 2 * 2 * 16 * 4  # tokens, keys and values, heads, channels, bytes
    before, after = sizes["kv_paged"]
    table = 4 * 64
    assert before == (1 + 64) * page + table + 4
    assert after == (1 + 64 + 8 * (8 + 1)) * page + 8 * (table + 4)  # 64 tokens and the copy of the last page
    assert after < 0.3 * sizes["dense"][1]


def test_a_branch_that_leaves_what_is_shared_is_computed_anew():
    """To write into a shared page would change the other branches."""
    session = Session(program("kv_paged"))
    session.feed([PREFIX], room=20)
    branches = session.fork([[5], [6]], room=10)
    other = [*PREFIX[:20], 1, 2, 3]
    assert branches.feed([other, [*PREFIX, 6]], room=10) == len(other) + len(PREFIX) + 1
    assert decode(branches, 10) == [alone(program("kv_paged"), row, 10) for row in (other, [*PREFIX, 6])]


def test_a_fork_may_need_more_room_than_there_is():
    ours, session = program("kv_paged"), Session(program("kv_paged"))
    session.feed([PREFIX * 3])  # 225 of 256 slots
    branches = session.fork([[5, 6, 7], [8]], room=20)
    assert decode(branches, 60)[1] == alone(ours, [*PREFIX * 3, 8], 60)  # and decoding more than was asked for


@pytest.mark.parametrize("cache", ["kv_paged", "kv_int4", "kv_paged_int4"])
def test_branches_speculate(cache):
    ours = speculative(program(cache), "ngram")
    session = Session(ours)
    session.feed([PREFIX], room=60)
    branches = session.fork(SUFFIXES, room=30)
    assert decode(branches, 30) == [alone(program(cache), PREFIX + suffix, 30) for suffix in SUFFIXES]


@pytest.mark.parametrize("cache", ["kv_paged", "kv_paged_int4"])
@pytest.mark.parametrize("steps", [1, 9])
def test_nothing_is_copied_when_pages_are_appended_to(cache, steps):
    """A step over donated pages, and a loop of them, changes these, and takes no memory for a second pool."""
    model = program(cache).model

    def loop(model, cache, tokens):
        return jax.lax.fori_loop(0, steps, lambda _, cache: model(tokens, cache)[1], cache)

    cache = jax.eval_shape(lambda: model.init_cache(2, 1 << 17))
    compiled = jax.jit(loop, donate_argnums=1).lower(model, cache, np.ones((2, 1), np.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * nbytes(cache) and memory.alias_size_in_bytes > 0.99 * nbytes(cache)


def test_mistakes_are_told_in_one_line():
    session = Session(program("dense"), 2)
    with pytest.raises(InputError, match="row 0 can't be forked: this session has 2; feed it some tokens"):
        session.fork([[1]])
    with pytest.raises(InputError, match="nothing to join"):
        session.join(Session(program("dense")), [1, 2])
    session.feed([PREFIX, [1]])
    with pytest.raises(InputError, match="row 2 can't be forked"):
        session.fork([[1]], of=2)
    for suffixes, of in ([], 0), ([[1]], [0, 1]):
        with pytest.raises(InputError, match="suffixes for"):
            session.fork(suffixes, of=of)
    with pytest.raises(InputError, match="token 96: must be in"):
        session.fork([[96]])
    assert session.rows == [PREFIX, [1]]
