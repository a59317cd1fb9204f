"""How fast programs are, side by side: they alternate round by round, so that noise hits all of them alike."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.decode.base import State
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.program import Program

_THREADS = min(8, os.cpu_count() or 1)  # that compile at once


@dataclasses.dataclass(frozen=True)
class Round:
    """Seconds of one prompt and its answer."""

    prefill: float  # from the tokens to the last one's logits
    first_token: float  # from the tokens to the first new token, on the host
    decode: float  # from the first new token to the last
    decoded: int  # new tokens in that time, all rows together
    whole: float  # from the tokens to the last new token


@dataclasses.dataclass(frozen=True)
class Rate:
    """A speed, or a time, over rounds: median, 10th and 90th percentile, and how it compares with the baseline's."""

    median: float
    p10: float
    p90: float
    ratio: float  # median of how many times as fast as the baseline it was in the same round
    ratio_p10: float
    ratio_p90: float


def measure_speed(
    programs: Mapping[str, Program], prompt: Sequence[int], new_tokens: int, rounds: int = 5, batch: int = 1
) -> dict[str, list[Round]]:
    """Return each program's rounds: greedy, `batch` rows of the same prompt, `new_tokens` after it, no early stop.

    Every second round runs in the opposite order. All that they run is compiled first, and the first round is not
    counted.

    Raises:
        InputError: fewer than 1 round, prompt token or row, fewer than 2 new tokens, or more than the context holds.
    """
    for name, value, least in (("rounds", rounds, 1), ("batch", batch, 1), ("decode tokens", new_tokens, 2)):
        if value < least:
            raise InputError(f"{name}={value}: must be {least} or more")
    for program in programs.values():
        limit = program.config.max_context
        if not 1 <= len(prompt) <= limit - new_tokens:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {new_tokens} after it: the prompt must be 1 token or more and "
                f"both fit the model's context of {limit}"
            )
    _compile(programs.values(), [list(prompt)] * batch, new_tokens)
    found: dict[str, list[Round]] = {name: [] for name in programs}
    for i in range(rounds + 1):
        for name in list(programs)[:: -1 if i % 2 else 1]:
            measured = _one_round(programs[name], prompt, new_tokens, batch)
            if i:
                found[name].append(measured)
    return found


def rate(of: Sequence[float], baseline: Sequence[float]) -> Rate:
    """Return the summary of speeds (larger is better), and of their ratios to the baseline's, round by round."""
    return Rate(*_spread(of), *_spread([a / b for a, b in zip(of, baseline, strict=True)]))


def latency(of: Sequence[float], baseline: Sequence[float]) -> Rate:
    """Return the summary of times (smaller is better), and how many times as fast as the baseline's, round by round."""
    return Rate(*_spread(of), *_spread([b / a for a, b in zip(of, baseline, strict=True)]))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    p10, p90 = np.percentile(values, (10, 90))
    return statistics.median(values), float(p10), float(p90)


def _compile(programs: Iterable[Program], rows: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Compile what a round runs, several programs at once: one after the other that takes minutes of a large model.

    What is on a mesh compiles when it is called: for where its arguments then are.
    """
    programs = [p for p in programs if not any(getattr(x, "committed", False) for x in jax.tree.leaves(p.model))]
    slots = loop.slots_for(len(rows[0]) + new_tokens)
    # A decoder may time the device here: that comes before anything compiles.
    owns = [jax.eval_shape(lambda x: x, p.decoder.prepare(p.model, rows, slots)) for p in programs]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        found = itertools.chain(*(_lowered(p, rows, new_tokens, own) for p, own in zip(programs, owns, strict=True)))
        jobs = [pool.submit(lowered.compile) for lowered in found]
    for job in jobs:
        job.result()


def _lowered(
    program: Program, rows: Sequence[Sequence[int]], new_tokens: int, own: Any
) -> Iterator[jax.stages.Lowered]:
    """Yield what is compiled for a round: the steps, and each shape of a prompt's chunks."""
    model, decoder = program.model, program.decoder
    slots = loop.slots_for(len(rows[0]) + new_tokens)
    cache = jax.eval_shape(lambda: loop.empty_cache(model, len(rows), slots))
    logits = jax.ShapeDtypeStruct((len(rows), model.config.vocab_size), jnp.float32)
    state = jax.eval_shape(functools.partial(start_greedy, program, new_tokens), cache, logits, own)
    yield loop.advance.lower(decoder, model, state, loop.TO_THE_END)
    shapes = {padded.shape: (padded, counts) for _, padded, counts in loop.chunks(rows)}
    for padded, counts in shapes.values():
        yield loop.prefill_chunk.lower(model, cache, logits, padded, counts)


def start_greedy(
    program: Program, new_tokens: int, cache: Cache, logits: Float[Array, "B V"], own: Any = None
) -> State:
    """Return the state of greedy decoding, `new_tokens` a row with no early stop; `own` is what `prepare` gave."""
    batch = len(logits)
    return loop.start(
        program.decoder, cache, logits, limit=np.full(batch, new_tokens), stop_ids=(), sampling=Sampling(),
        seeds=np.arange(batch), seen=None, own=own,
    )  # fmt: skip


def _one_round(program: Program, prompt: Sequence[int], new_tokens: int, batch: int) -> Round:
    rows = [list(prompt)] * batch
    slots = loop.slots_for(len(prompt) + new_tokens)
    begin = time.perf_counter()
    cache = loop.empty_cache(program.model, batch, slots)
    cache, logits = loop.prefill(program.model, cache, rows)
    own = program.decoder.prepare(program.model, rows, slots)
    jax.block_until_ready((logits, own))
    filled = time.perf_counter()
    state = start_greedy(program, new_tokens, cache, logits, own)
    first = int(np.asarray(state.emitted).sum())
    started = time.perf_counter()
    state = loop.advance(program.decoder, program.model, state, loop.TO_THE_END)
    decoded = int(np.asarray(state.emitted).sum()) - first
    done = time.perf_counter()
    return Round(filled - begin, started - begin, done - started, decoded, done - begin)
