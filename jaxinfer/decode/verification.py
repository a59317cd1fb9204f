"""What becomes of drafted tokens: how many are kept and what follows them, as laws and not as draws.

Drafts are nodes of a tree. Node 0 is the token that every row already has, node i > 0 a drafted one whose parent is
`parents[i] < i`; a chain is the tree in which each node's parent is the one before it. `p[:, i]` is the target's
distribution of the token after node i, `q[:, i]` the one that node i's children were drawn from. A verifier returns a
`Law`. Where it says that it is exact, the tokens that come out have the target's law, whatever the drafter proposes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxinfer.errors import InputError
from jaxinfer.ops.token_tree import TokenTree, check_parents


class Law(NamedTuple):
    """The probability that node i is the last one that is kept, and the distribution of the token after it if it is."""

    last: Float[Array, "B N"]
    following: Float[Array, "B N V"]

    def draw(self, keys: Key[Array, "B"]) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
        """Return the last node that is kept, and the token after it."""

        def one(key, last, following):
            first, second = jax.random.split(key)
            node = jax.random.categorical(first, jnp.log(last))
            return node, jax.random.categorical(second, jnp.log(following[node]))

        node, token = jax.vmap(one)(keys, *self)
        return node.astype(jnp.int32), token.astype(jnp.int32)


def chain(length: int) -> tuple[int, ...]:
    """Return the parents of a chain of `length` drafted tokens."""
    return tuple(range(-1, length))


def greedy(
    best: Int[Array, "B N"], tokens: Int[Array, "B N"], parents: Sequence[int]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Return the last node of the path that greedy decoding takes, and the token after it; exact.

    `best[:, i]` is the target's choice after node i, `tokens` are those of the nodes.
    """
    _check(parents, tokens.shape[1])
    depth = TokenTree.of(parents).depth
    kept = [jnp.ones(len(tokens), bool)]
    for node in range(1, len(parents)):
        kept.append(kept[parents[node]] & (tokens[:, node] == best[:, parents[node]]))
    # Siblings may have the same token, and different ones after it: of all paths that stand the longest is taken.
    last = jnp.argmax(jnp.where(jnp.stack(kept, axis=1), depth, -1), axis=1).astype(jnp.int32)
    return last, jnp.take_along_axis(best, last[:, None], axis=1)[:, 0]


def rejection(
    p: Float[Array, "B N V"],
    q: Float[Array, "B N V"] | None,
    tokens: Int[Array, "B N"],
    parents: Sequence[int],
    replacement: bool = True,
    count: Int[Array, "B"] | None = None,
) -> Law:
    """Return the law of speculative sampling; exact.

    Siblings are tried in order: one is kept with probability min(1, p(x) / q(x)), or else p becomes (p - q)+,
    normalized, for the next. `q` None says that the children are no draws but certain (prompt lookup); `replacement`
    whether siblings are independent draws, or each without the tokens of those before it. Of row b only the first
    count[b] drafted nodes are there (default all). (2211.17192, 2302.01318;
    trees: SpecInfer, 2305.09781.)
    """
    _check(parents, tokens.shape[1])
    reached: list[Array] = [jnp.ones(len(tokens))] + [jnp.zeros(len(tokens))] * (len(parents) - 1)
    last, following = [], []
    for node in range(len(parents)):
        target, left = p[:, node], jnp.ones(len(tokens))
        drafter = None if q is None else q[:, node]
        for child in (i for i in range(1, len(parents)) if parents[i] == node):
            token = tokens[:, child]
            there = jnp.ones(len(tokens), bool) if count is None else child <= count
            kept = _ratio(_at(target, token), jnp.ones(len(tokens)) if drafter is None else _at(drafter, token))
            kept = jnp.where(there, kept, 0)
            reached[child] = reached[node] * left * kept
            left *= 1 - kept
            if drafter is None:
                rest = _normalized(_without(target, token), target)
            else:
                rest = _normalized(jnp.maximum(target - drafter, 0), target)
            target = jnp.where(there[:, None], rest, target)
            if drafter is not None:
                drafter = drafter if replacement else _normalized(_without(drafter, token), drafter)
        last.append(reached[node] * left)
        following.append(target)
    return Law(jnp.stack(last, axis=1), jnp.stack(following, axis=1))


def block(
    p: Float[Array, "B N V"],
    q: Float[Array, "B N V"] | None,
    tokens: Int[Array, "B N"],
    count: Int[Array, "B"] | None = None,
) -> Law:
    """Return the law of block verification of a chain; exact, and keeps at least as many tokens as `rejection`.

    Of row b only the first count[b] drafted nodes are there (default all).

    With w_0 = 1 and w_i = min(1, w_{i-1} p(x_i) / q(x_i)), node i > 0 may be the last one with probability
    h_i = S_i / (S_i + 1 - w_i), S_i = sum_x (w_i p(x) - q(x))+, and h = w at the end: the last that may is.
    (Block Verification Accelerates Speculative Decoding, 2403.10444.)
    """
    nodes = tokens.shape[1]
    count = jnp.full(len(tokens), nodes - 1) if count is None else count
    weight, last, following = jnp.ones(len(tokens)), [], []
    for node in range(nodes):
        target = p[:, node]
        if node:
            before = _at(p[:, node - 1], tokens[:, node])
            drawn = jnp.ones_like(weight) if q is None else _at(q[:, node - 1], tokens[:, node])
            weight = jnp.minimum(1, weight * jnp.where(drawn > 0, before / jnp.where(drawn > 0, drawn, 1), 0))
        ends = node == count
        if node == nodes - 1:
            may, rest = weight, target
        else:
            scaled = weight[:, None] * target
            if q is None:  # all of q is on the next token
                rest = jnp.where(
                    jax.nn.one_hot(tokens[:, node + 1], target.shape[1], dtype=bool), jnp.maximum(scaled - 1, 0), scaled
                )
            else:
                rest = jnp.maximum(scaled - q[:, node], 0)
            total = rest.sum(axis=1)
            least = total + (1 - weight)  # in this order it is not below the total, whose share can't be above 1
            may = jnp.where(least > 0, total / jnp.where(least > 0, least, 1), 1)
            # Where no draft follows, the node is the end of its chain; what is past an end may not be the last one.
            may, rest = jnp.where(ends, weight, may), jnp.where(ends[:, None], target, rest)
        may = jnp.where(node <= count, may, 0)
        last = [x * (1 - may) for x in last] + [may if node else jnp.ones_like(may)]
        following.append(_normalized(rest, target))
    return Law(jnp.stack(last, axis=1), jnp.stack(following, axis=1))


def typical(
    p: Float[Array, "B N V"],
    tokens: Int[Array, "B N"],
    parents: Sequence[int],
    epsilon: float,
    delta: float,
    count: Int[Array, "B"] | None = None,
) -> Law:
    """Return the law of typical acceptance: lossy. The longest path is kept whose tokens are likely enough.

    A token is if p(x) > min(epsilon, delta exp(-H(p))); what follows has the target's distribution. Of row b only the
    first count[b] drafted nodes are there (default all).
    (Medusa, 2401.10774.)
    """
    _check(parents, tokens.shape[1])
    entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(axis=2)
    least = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
    depth = [0]
    reach = [jnp.zeros(len(tokens), jnp.int32)]  # the depth of a node that is kept, or -1
    for node in range(1, len(parents)):
        parent = parents[node]
        depth.append(depth[parent] + 1)
        likely = _at(p[:, parent], tokens[:, node]) > least[:, parent]
        likely &= True if count is None else node <= count
        reach.append(jnp.where((reach[parent] >= 0) & likely, depth[node], -1))
    longest = jnp.argmax(jnp.stack(reach, axis=1), axis=1)
    return Law(jax.nn.one_hot(longest, len(parents)), p)


def _check(parents: Sequence[int], count: int) -> None:
    check_parents(parents)
    if len(parents) != count:
        raise InputError(f"parents={tuple(parents)}: must be -1 and then, for {count} nodes, an earlier one for each")


def _at(x: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(x, token[:, None], axis=1)[:, 0]


def _without(x: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B V"]:
    return x.at[jnp.arange(len(x)), token].set(0)


def _ratio(a: Float[Array, "B"], b: Float[Array, "B"]) -> Float[Array, "B"]:
    """Return min(1, a / b); 0 where b is 0, as no draft is."""
    return jnp.where(b > 0, jnp.minimum(1, a / jnp.where(b > 0, b, 1)), 0)


def _normalized(x: Float[Array, "B V"], otherwise: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Return x as a distribution; `otherwise` where x is 0, which is where its own probability is."""
    total = x.sum(axis=1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), otherwise)
