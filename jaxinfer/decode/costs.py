"""What a check and a draft of each width cost on this device, measured once."""

import functools
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxinfer.decode.draft import Drafter, Known
from jaxinfer.decode.pace import Costs
from jaxinfer.decode.verification import chain
from jaxinfer.machine import kept
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.token_tree import TokenTree

_PASSES = 4  # that one timing repeats
_ROUNDS = 4, 24  # of timings, in turns, at least and at most, as fit some seconds
_SECONDS = 3.0
_memory: dict[tuple, Costs] = {}


def costs_of(
    model: Transformer, drafter: Drafter, widths: Sequence[int], batch: int, slots: int, anew: bool = False
) -> Costs:
    """Return what a check, and a draft, of each width costs for `batch` rows in caches of `slots` slots, 3/4 full.

    (Slots are powers of two, so a text fills between half of them and all.)

    From the cache directory if this device, with a model and a drafter of these shapes, was measured before, unless
    they are to be measured `anew`.
    """
    shapes = [(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves((model, drafter))]
    key = (tuple(shapes), drafter.parents, type(drafter).__name__, tuple(widths), batch, slots)
    if anew or key not in _memory:

        def measure():
            if not anew:
                print("measuring what drafts and their checks cost here, once ...", file=sys.stderr, flush=True)
            return _measure(model, drafter, widths, batch, slots)

        found = measure() if anew else kept("check_costs", key, measure)
        _memory[key] = Costs(*(np.asarray(x, np.float32) for x in found))
    return _memory[key]


def _measure(model, drafter, widths, batch: int, slots: int) -> tuple[list[float], list[float]]:
    # Tokens of no meaning, all different: what a drafter finds in them is nothing, and it looks at all of them.
    row = (np.arange(slots * 3 // 4) * 7919 % model.config.vocab_size).tolist()
    known = Known(
        jnp.zeros((batch, slots), jnp.int32).at[:, : len(row)].set(jnp.asarray(row)), jnp.full(batch, len(row))
    )
    own = drafter.prepare(model, [row[:-1]] * batch, slots)
    # A check changes the cache in place, as a step does: a copy of it would cost every width the same.
    held = [model.init_cache(batch, slots).longer(jnp.full(batch, len(row) - 1))]

    def check(width: int, tree: TokenTree | None) -> Array:
        tokens, cache = _checks(model, held.pop(), width + 1, tree)
        held.append(cache)
        return tokens

    def draft(width: int) -> Array:
        return _drafts(model, drafter, own, held[0], known, np.int32(width))

    runs: list[Callable[[], Array]] = []
    for width in widths:
        parents = drafter.parents[: width + 1]
        tree = None if parents == chain(width) else TokenTree.of(parents)
        runs.append(functools.partial(check, width, tree))
    runs += [functools.partial(draft, width) for width in widths]

    def seconds(run: Callable[[], Array]) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - begin

    for run in runs:  # which compiles
        seconds(run)
    least, most = _ROUNDS
    rounds: list[list[float]] = []  # machines have busy moments, which shares of one round do not show
    begun = time.perf_counter()
    while len(rounds) < least or (len(rounds) < most and time.perf_counter() - begun < _SECONDS):
        rounds.append([seconds(run) for run in runs])
    found = np.asarray(rounds)
    # An empty draft costs what the dispatch does.
    found[:, len(widths) :] -= found[:, len(widths)][:, None]
    cost = np.maximum(np.median(found / found[:, :1], axis=0), 0)
    return cost[: len(widths)].tolist(), cost[len(widths) :].tolist()


@functools.partial(jax.jit, static_argnames=("width",), donate_argnames=("cache",))
def _checks(model, cache, width: int, tree):
    """Feed `width` tokens and forget them, again and again; a pass takes the tokens that the last one liked."""
    start = cache.length

    def one(_, carry):
        cache, tokens = carry
        hidden, cache = model(tokens, cache, jnp.full((len(tokens),), width, jnp.int32), tree)
        return cache.rewind(start), jnp.argmax(model.logits(hidden), axis=2).astype(jnp.int32)

    cache, tokens = jax.lax.fori_loop(0, _PASSES, one, (cache, jnp.zeros((len(start), width), jnp.int32)))
    return tokens, cache


@jax.jit
def _drafts(model, drafter, own, cache, known: Known, width):
    """Draft after one text, again and again; each time its newest token is another one."""
    from jaxinfer.decode.base import State
    from jaxinfer.decode.sampling import Sampling

    B = len(known.length)
    zeros = jnp.zeros(B, jnp.int32)
    keys = jax.vmap(jax.random.key)(jnp.zeros(B, jnp.uint32))
    rows = jnp.arange(B)

    def one(_, carry):
        own, last = carry
        now = known._replace(tokens=known.tokens.at[rows, known.length - 1].set(last))
        state = State(
            cache=cache, last=last, tokens=jnp.zeros((B, 1), jnp.int32), emitted=zeros, limit=zeros + 64,
            done=zeros > 0, stop_ids=jnp.zeros(0, jnp.int32), sampling=Sampling(), rng=keys, seen=None,
        )  # fmt: skip
        draft, own = drafter.propose(model, own, now, state, keys, width, False)
        # A draft that is not used would not be made: what it begins is part of the next one's tokens.
        used = jnp.float32(0) if draft.begun is None else draft.begun.hidden.astype(jnp.float32).sum()
        token = draft.tokens[:, 0] + jnp.where(jnp.isnan(used), 1, 0)
        return drafter.settle(own, known, None), token

    return jax.lax.fori_loop(0, _PASSES, one, (own, zeros))[1]
