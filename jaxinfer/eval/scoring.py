"""Log-likelihoods of continuations: what every evaluation here is computed from."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.errors import InputError
from jaxinfer.eval.journal import Journal
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context, which is not scored, and of its continuation
_LOGITS = 1 << 25  # logits held at once: 128 MiB in float32, whatever the batch, the length and the vocabulary


class Score(NamedTuple):
    """How likely a continuation is: the sum of its tokens' log-probabilities, in nats."""

    logprob: float
    greedy: bool  # whether every token of it is the most likely one


def loglikelihood(program: Program, pairs: Sequence[Pair], batch_size: int = 8, progress: bool = False) -> list[Score]:
    """Return the score of each pair's continuation after its context.

    A context that is too long for the model is cut from the left. Log-softmax and sums are in float32 or better.

    Raises:
        InputError: an empty context or continuation, a continuation longer than the model's context, an id outside
            the vocabulary.
    """
    found = dict(score_each(program, pairs, batch_size, progress))
    return [found[i] for i in range(len(pairs))]


def score_each(
    program: Program, pairs: Sequence[Pair], batch_size: int = 8, progress: bool = False
) -> Iterator[tuple[int, Score]]:
    """Yield each pair's index and score as they become known: the longest first, so that memory fails early."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be 1 or more")
    rows = [_row(program, i, *pair) for i, pair in enumerate(pairs)]
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    batch_size = min(batch_size, len(rows))
    with tqdm(total=len(rows), unit="row", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[i] for i in chosen] + [([], 0)] * (batch_size - len(chosen))  # one shape for the last too
            yield from zip(chosen, _score_batch(program.model, batch), strict=False)
            bar.update(len(chosen))


def score_items(
    program: Program,
    items: Sequence[Sequence[Pair]],
    judge: Callable[[int, list[Score]], dict[str, Any]],
    *,
    batch_size: int = 8,
    progress: bool = False,
    journal: Journal | None = None,
) -> tuple[list[dict[str, Any]], int]:
    """Return `judge(item index, its pairs' scores)` of every item, and how many tokens the model was fed.

    Items that `journal` has are not computed again; the others are added to it.
    """
    done = {} if journal is None else {i: journal.done[i] for i in range(len(items)) if i in journal.done}
    owner = [(i, k) for i, pairs in enumerate(items) if i not in done for k in range(len(pairs))]
    pairs = [items[i][k] for i, k in owner]
    waiting: dict[int, dict[int, Score]] = {}
    for p, score in score_each(program, pairs, batch_size, progress) if pairs else ():
        i, k = owner[p]
        scores = waiting.setdefault(i, {})
        scores[k] = score
        if len(scores) == len(items[i]):
            done[i] = judge(i, [scores[k] for k in range(len(scores))])
            del waiting[i]
            if journal is not None:
                journal.append(i, done[i])
    tokens = sum(min(len(context) + len(more) - 1, program.config.max_context) for context, more in pairs)
    return [done[i] for i in range(len(items))], tokens


def _row(program: Program, index: int, context: Sequence[int], continuation: Sequence[int]) -> tuple[list[int], int]:
    """Return the tokens of a pair, cut to what the model can see, and how many of them are scored."""
    limit, vocab = program.config.max_context, program.config.vocab_size
    if not len(context) or not len(continuation):
        raise InputError(f"pair {index}: its {'continuation' if len(context) else 'context'} is empty; give 1 token")
    if len(continuation) > limit:
        raise InputError(f"pair {index}: a continuation of {len(continuation)} tokens, the model's context is {limit}")
    tokens = [int(t) for t in itertools.chain(context, continuation)][-(limit + 1) :]
    if not (min(tokens) >= 0 and max(tokens) < vocab):
        raise InputError(f"pair {index}: has a token outside 0..{vocab - 1}; is this the right tokenizer?")
    return tokens, len(continuation)


def _score_batch(model: Transformer, rows: list[tuple[list[int], int]]) -> list[Score]:
    """Score the last tokens of each row, in chunks of at most `loop.CHUNK` tokens of every row."""
    fed = [tokens[:-1] for tokens, _ in rows]  # the last token is only a target
    targets = [tokens[1:] for tokens, _ in rows]
    first = [len(tokens) - scored for tokens, (_, scored) in zip(targets, rows, strict=True)]
    longest = max(len(row) for row in fed)
    cache = loop.empty_cache(model, len(rows), loop.slots_for(longest))
    logprobs: list[float] = [0.0] * len(rows)
    greedy = [True] * len(rows)
    for start, tokens, counts in loop.chunks(fed):
        wanted = [(b, t) for b, n in enumerate(counts) for t in range(max(first[b] - start, 0), n)]
        size = max(256, 1 << (len(wanted) - 1).bit_length()) if wanted else 256
        at = np.zeros((3, size), np.int32)  # row, place in the chunk, target; the rest is scored and ignored
        for m, (b, t) in enumerate(wanted):
            at[:, m] = b, t, targets[b][start + t]
        cache, nats, hits = _score_chunk(model, cache, tokens, counts, *at)
        for (b, _), value, hit in zip(wanted, fetch(nats).astype(np.float64), fetch(hits), strict=False):
            logprobs[b] += float(value)
            greedy[b] &= bool(hit)
    return [Score(*pair) for pair in zip(logprobs, greedy, strict=True)]


@functools.partial(jax.jit, donate_argnames=("cache",))
def _score_chunk(
    model: Transformer,
    cache: Cache,
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
    row: Int[Array, "M"],
    place: Int[Array, "M"],
    target: Int[Array, "M"],
) -> tuple[Cache, Float[Array, "M"], Bool[Array, "M"]]:
    """Return the longer cache, and of M places the target's log-probability and whether it is the most likely."""
    hidden, cache = model(tokens, cache, counts)
    size = min(len(row), max(64, 1 << (_LOGITS // model.config.vocab_size).bit_length() - 1))
    # Only the places that are scored get logits, and of those only `size` exist at a time.
    blocks = (hidden[row, place].reshape(-1, size, hidden.shape[-1]), target.reshape(-1, size))

    def score(block):
        hidden, target = block
        logits = model.logits(hidden[None])[0]
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=1), jnp.argmax(logits, axis=1) == target

    nats, hits = jax.lax.map(score, blocks)
    return cache, nats.reshape(-1), hits.reshape(-1)
