"""How fast programs are, side by side: they alternate round by round, so that noise hits all of them alike."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.program import Program


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

    Every second round runs in the opposite order. The round before the first compiles and is not counted.

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


def _one_round(program: Program, prompt: Sequence[int], new_tokens: int, batch: int) -> Round:
    rows = [list(prompt)] * batch
    slots = loop.slots_for(len(prompt) + new_tokens)
    begin = time.perf_counter()
    cache = loop.empty_cache(program.model, batch, slots)
    cache, logits = loop.prefill(program.model, cache, rows)
    own = program.decoder.prepare(program.model, rows, slots)
    jax.block_until_ready((logits, own))
    filled = time.perf_counter()
    state = loop.start(
        program.decoder,
        cache,
        logits,
        limit=np.full(batch, new_tokens),
        stop_ids=(),
        sampling=Sampling(),
        seeds=np.arange(batch),
        seen=None,
        own=own,
    )
    first = int(np.asarray(state.emitted).sum())
    started = time.perf_counter()
    state = loop.advance(program.decoder, program.model, state, np.int32(1 << 30))
    decoded = int(np.asarray(state.emitted).sum()) - first
    done = time.perf_counter()
    return Round(filled - begin, started - begin, done - started, decoded, done - begin)
