"""Verifiers leave the target's law as it is: the joint law of all outputs, by enumeration of every draft."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.decode.verification import Law, block, chain, greedy, rejection, typical
from jaxinfer.errors import InputError

TREES = {
    "one": chain(1), "two": chain(2), "three": chain(3), "siblings": (-1, 0, 0), "three_siblings": (-1, 0, 0, 0),
    "branches": (-1, 0, 0, 1, 1), "uneven": (-1, 0, 1, 0),
}  # fmt: skip


def table(seed: int, V: int, sparse: bool):
    """Return a random next-token distribution for each prefix."""

    @functools.cache
    def of(prefix: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        x = rng.gamma(0.5, size=V)
        if sparse:  # as top-k leaves it
            x[rng.integers(V)] = 0
        return x / x.sum()

    return of


def path(tokens, parents, node):
    found = []
    while node:
        found.append(tokens[node])
        node = parents[node]
    return tuple(found[::-1])


def drafts(parents, q, replacement):
    """Yield every choice of the drafted tokens with its probability."""
    V = len(q(()))
    for choice in itertools.product(range(V), repeat=len(parents) - 1):
        tokens = (0, *choice)
        probability = 1.0
        for node in range(1, len(parents)):
            own = q(path(tokens, parents, parents[node])).copy()
            if not replacement:
                for sibling in range(1, node):
                    if parents[sibling] == parents[node]:
                        own[tokens[sibling]] = 0
                own = own / own.sum() if own.sum() > 0 else own
            probability *= own[tokens[node]]
        if probability > 0:
            yield tokens, probability


def joint(verify, parents, p, q, replacement=True):
    """Return the law of the first tokens that come out, as long as the longest path and one more."""
    V, depth = len(p(())), max(len(path(range(len(parents)), parents, n)) for n in range(len(parents))) + 1
    law = np.zeros((V,) * depth)
    choices = list(drafts(parents, q, replacement))
    tokens = jnp.array([t for t, _ in choices])
    at = [[path(t, parents, node) for node in range(len(parents))] for t, _ in choices]
    found = verify(
        jnp.array([[p(x) for x in row] for row in at]), jnp.array([[q(x) for x in row] for row in at]), tokens
    )
    last, following = np.asarray(found.last, np.float64), np.asarray(found.following, np.float64)
    np.testing.assert_allclose(last.sum(axis=1), 1, atol=1e-5)
    for row, (t, probability) in enumerate(choices):
        for node in range(len(parents)):
            kept = path(t, parents, node)
            for y in range(V):
                weight = probability * last[row, node] * following[row, node, y]
                for rest in itertools.product(range(V), repeat=depth - len(kept) - 1):
                    out, w = (*kept, y), weight
                    for z in rest:
                        w, out = w * p(out)[z], (*out, z)
                    law[out] += w
    expected = np.ones((V,) * depth)
    for out in np.ndindex(*expected.shape):
        for i, z in enumerate(out):
            expected[out] *= p(out[:i])[z]
    return law, expected


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("tree", "V"), [("one", 5), ("two", 4), ("three", 3), ("siblings", 4), ("three_siblings", 3),
                                         ("branches", 3), ("uneven", 3)])  # fmt: skip
def test_rejection_has_the_target_s_law(tree, V, sparse):
    parents = TREES[tree]
    for replacement in (True, False):
        verify = functools.partial(rejection, parents=parents, replacement=replacement)
        if not replacement and sparse and tree == "three_siblings":
            continue  # two tokens have no third sibling
        law, expected = joint(verify, parents, table(1, V, sparse), table(2, V, sparse), replacement)
        np.testing.assert_allclose(law, expected, atol=1e-6)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("length", "V"), [(1, 5), (2, 5), (3, 3)])
def test_block_verification_has_the_target_s_law_and_keeps_no_fewer_tokens(length, V, sparse):
    p, q = table(1, V, sparse), table(2, V, sparse)
    law, expected = joint(block, chain(length), p, q)
    np.testing.assert_allclose(law, expected, atol=1e-6)
    kept = {}
    for name, verify in (("block", block), ("rejection", functools.partial(rejection, parents=chain(length)))):
        kept[name] = 0.0
        for tokens, probability in drafts(chain(length), q, True):
            at = [path(tokens, chain(length), node) for node in range(length + 1)]
            found = verify(*(jnp.array([[f(x) for x in at]]) for f in (p, q)), jnp.array([tokens]))
            kept[name] += probability * float((found.last[0] * np.arange(length + 1)).sum())
    assert kept["block"] >= kept["rejection"] - 1e-6
    if length > 1:
        assert kept["block"] > kept["rejection"] + 1e-4


@pytest.mark.parametrize("verify", ["rejection", "block"])
def test_drafts_that_are_certain_have_the_target_s_law_too(verify):
    p, V, parents = table(1, 4, True), 4, chain(2)
    for tokens in itertools.product(range(V), repeat=2):
        certain = functools.cache(lambda prefix, t=tokens: np.eye(V)[t[len(prefix)] if len(prefix) < 2 else 0])
        if verify == "block":
            law, expected = joint(lambda p, q, t: block(p, None, t), parents, p, certain)
        else:
            law, expected = joint(lambda p, q, t: rejection(p, None, t, parents), parents, p, certain)
        np.testing.assert_allclose(law, expected, atol=1e-6)


def test_a_draft_that_equals_the_target_is_kept_whole():
    p = table(1, 5, False)
    for tokens, _ in drafts(chain(3), p, True):
        at = [path(tokens, chain(3), node) for node in range(4)]
        given = jnp.array([[p(x) for x in at]])
        for found in (rejection(given, given, jnp.array([tokens]), chain(3)), block(given, given, jnp.array([tokens]))):
            np.testing.assert_allclose(found.last[0], [0, 0, 0, 1], atol=1e-6)


def test_the_expected_number_of_tokens_follows_the_acceptance_rate():
    """A drafter that is right with the same chance everywhere: (1 - a^(g+1)) / (1 - a)."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    rate, length = np.minimum(p, q).sum(), 3
    mean = 0.0
    for tokens, probability in drafts(chain(length), lambda _: q, True):
        found = rejection(
            *(jnp.tile(jnp.array(x), (1, length + 1, 1)) for x in (p, q)), jnp.array([tokens]), chain(length)
        )
        mean += probability * float((found.last[0] * np.arange(1, length + 2)).sum())
    np.testing.assert_allclose(mean, (1 - rate ** (length + 1)) / (1 - rate), rtol=1e-5)


def test_greedy_keeps_the_path_that_greedy_decoding_takes():
    parents = (-1, 0, 0, 1, 2, 4)
    tokens = jnp.array([[9, 5, 6, 7, 8, 3], [9, 5, 6, 7, 8, 3], [9, 6, 6, 7, 8, 3]])
    best = jnp.array([[6, 0, 8, 0, 3, 1], [5, 2, 8, 0, 0, 1], [6, 7, 8, 4, 0, 1]])
    last, token = greedy(best, tokens, parents)
    assert last.tolist() == [5, 1, 3] and token.tolist() == [1, 2, 4]  # of twins the first


def test_typical_acceptance_keeps_what_is_likely_enough():
    sure, flat = [0.97, 0.01, 0.01, 0.01], [0.25] * 4
    p = jnp.array([[sure, flat, sure], [flat, sure, flat]])
    found = typical(p, jnp.array([[0, 0, 3], [0, 2, 1]]), chain(2), epsilon=0.3, delta=0.5)
    assert found.last.argmax(axis=1).tolist() == [2, 1]  # a flat distribution lets any token pass, a sharp one does not
    np.testing.assert_array_equal(found.following, p)


def test_draws_follow_the_law():
    law = Law(jnp.array([[0.2, 0.8]]), jnp.array([[[0.5, 0.5, 0.0], [0.0, 0.1, 0.9]]]))
    many = Law(*(jnp.repeat(x, 20_000, axis=0) for x in law))
    node, token = jax.jit(Law.draw)(many, jax.random.split(jax.random.key(0), 20_000))
    counts = np.zeros((2, 3))
    np.add.at(counts, (np.asarray(node), np.asarray(token)), 1 / 20_000)
    np.testing.assert_allclose(counts, [[0.1, 0.1, 0.0], [0.0, 0.08, 0.72]], atol=0.012)
    assert counts[0, 2] == counts[1, 0] == 0


@pytest.mark.parametrize("parents", [(0, 0, 1), (-1, 1, 0), (-1, 0)])
def test_parents_that_are_no_tree_are_refused(parents):
    with pytest.raises(InputError, match="must be -1 and then, for"):
        rejection(jnp.ones((1, 3, 2)), None, jnp.zeros((1, 3), jnp.int32), parents)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("verify", [block, functools.partial(rejection, parents=chain(3))], ids=["block", "rejection"])
def test_a_shorter_draft_is_as_if_the_rest_were_not_there(verify, certain):
    rng = np.random.default_rng(0)
    p, q = (jnp.asarray(rng.dirichlet(np.ones(4), (5, 4)), jnp.float32) for _ in range(2))
    tokens, q = jnp.asarray(rng.integers(4, size=(5, 4)), jnp.int32), None if certain else q
    count = jnp.asarray([0, 1, 2, 3, 1])
    found = verify(p, q, tokens, count=count)
    for row, n in enumerate(count.tolist()):
        cut = (slice(row, row + 1), slice(n + 1))
        own = {"parents": chain(n)} if verify is not block else {}
        expected = getattr(verify, "func", verify)(p[cut], None if certain else q[cut], tokens[cut], **own)
        np.testing.assert_allclose(found.last[row], np.pad(expected.last[0], (0, 3 - n)), atol=1e-6)
        np.testing.assert_allclose(found.following[row, : n + 1], expected.following[0], atol=1e-6)


def test_rounding_never_makes_a_probability_negative():
    """Draft and target differ in a last bit, as those of one model do."""
    p = jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (2000, 5, 8)))
    q = p * (1 + 1e-6 * jax.random.normal(jax.random.key(1), p.shape))
    tokens = jax.random.categorical(jax.random.key(2), jnp.log(q)).astype(jnp.int32)
    for law in (jax.jit(block)(p, q, tokens), jax.jit(rejection, static_argnums=3)(p, q, tokens, chain(4))):
        assert float(law.last.min()) >= 0 and float(law.following.min()) >= 0
        assert float(law.last[:, -1].min()) > 0.999
