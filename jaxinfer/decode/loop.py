"""Running a decoder from the host: prompts in padded chunks, then steps, each one dispatch of a compiled function."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache.base import Cache
from jaxinfer.decode.base import Decoder, State, run
from jaxinfer.decode.sampling import Sampling
from jaxinfer.models.transformer import Transformer

CHUNK = 1024  # prompt tokens a dispatch: bounds the memory of a long prefill and the number of shapes
TO_THE_END = np.int32(1 << 30)  # steps of `advance` at most: those of a state are fewer
BUCKETS = (16, 32, 64, 128, 192, 256, 384, 512, 768, CHUNK)  # padded chunk lengths, so that few shapes compile


def slots_for(tokens: int) -> int:
    """Return the cache slots to allocate for `tokens`: a power of two, so that few shapes compile."""
    return max(256, 1 << (tokens - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("batch", "slots"))
def empty_cache(model: Transformer, batch: int, slots: int) -> Cache:
    """Return an empty cache for `batch` rows."""
    return model.init_cache(batch, slots)


@functools.partial(jax.jit, donate_argnames=("cache", "logits"))
def prefill_chunk(
    model: Transformer,
    cache: Cache,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B T"],
    counts: Int[Array, "B"],
) -> tuple[Cache, Float[Array, "B V"]]:
    """Append a chunk of each row's tokens; the logits of a row of none stay."""
    hidden, cache = model(tokens, cache, counts)
    last = jnp.maximum(counts - 1, 0)[:, None, None]
    hidden = jnp.take_along_axis(hidden, last, axis=1)  # only the last token's logits are wanted: 1/T of that work
    return cache, jnp.where((counts > 0)[:, None], model.logits(hidden)[:, 0], logits)


def chunks(rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]]:
    """Yield rows by chunks: where one starts, its tokens padded to a bucket, how many of each row's are real."""
    for start in range(0, max(len(row) for row in rows), CHUNK):
        parts = [row[start : start + CHUNK] for row in rows]
        counts = np.array([len(part) for part in parts], np.int32)
        padded = np.zeros((len(rows), next(b for b in BUCKETS if b >= counts.max())), np.int32)
        for i, part in enumerate(parts):
            padded[i, : len(part)] = part
        yield start, padded, counts


def prefill(
    model: Transformer, cache: Cache, rows: Sequence[Sequence[int]], progress: Callable[[int], object] | None = None
) -> tuple[Cache, Float[Array, "B V"]]:
    """Append each row's tokens to the cache (which is donated) and return the logits after its last one.

    Rows may differ in length, and be empty; `progress` is told the tokens done after each chunk.
    """
    logits = jnp.zeros((len(rows), model.config.vocab_size), jnp.float32)
    for _, padded, counts in chunks(rows):
        cache, logits = prefill_chunk(model, cache, logits, padded, counts)
        if progress is not None:
            progress(int(counts.sum()))
    return cache, logits


@functools.partial(jax.jit, static_argnames=("room",), donate_argnames=("cache", "own"))
def _start(decoder, cache, logits, limit, stop_ids, sampling, seeds, seen, own, room):
    B = logits.shape[0]
    zeros = jnp.zeros((B,), jnp.int32)
    state = State(
        cache=cache,
        last=zeros,
        tokens=jnp.zeros((B, room), jnp.int32),
        emitted=zeros,
        limit=limit,
        done=limit <= 0,
        stop_ids=stop_ids,
        sampling=sampling,
        rng=jax.vmap(jax.random.key)(seeds),
        seen=seen,
        own=own,
    )
    return decoder.init(logits, state)


def start(
    decoder: Decoder,
    cache: Cache,
    logits: Float[Array, "B V"],
    *,
    limit: Int[np.ndarray, "B"],
    stop_ids: Sequence[int],
    sampling: Sampling,
    seeds: Int[np.ndarray, "B"],
    seen: Bool[np.ndarray, "B V"] | None,
    own: Any = None,
) -> State:
    """Return the state after the first token of every row whose limit is above 0; `own` is what `prepare` gave."""
    room = max(64, 1 << (int(limit.max()) - 1).bit_length())
    stop = np.array(sorted(stop_ids), np.int32)
    limit, seeds = limit.astype(np.int32), seeds.astype(np.uint32)
    return _start(decoder, cache, logits, limit, stop, sampling, seeds, seen, own, room)


advance = jax.jit(run, donate_argnums=2)


@functools.partial(jax.jit, donate_argnums=0)
def finish(state: State, rows: Bool[Array, "B"]) -> State:
    """Return the state with `rows` done: the host has seen a stop that the device can't, such as a string."""
    return state.replace(done=state.done | rows)


@functools.partial(jax.jit, donate_argnums=0)
def rewind(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """Return the cache cut to the first length[b] tokens of each row."""
    return cache.rewind(length)


def fork(cache: Cache, rows: Int[np.ndarray, "n"], length: Int[np.ndarray, "n"], room: int) -> Cache:
    """Return a cache whose row i goes on from the first length[i] tokens of row rows[i], for up to `room` more.

    Rows that don't stay on their devices are copied to others, and share nothing.
    """
    if not cache.stays(rows):
        cache, rows = take(cache, rows), np.arange(len(rows), dtype=np.int32)
    return _fork(cache, rows, length, room)


@functools.partial(jax.jit, static_argnames="room")
def _fork(cache, rows, length, room):
    return cache.fork(rows, length, room)


@jax.jit
def take(cache: Cache, rows: Int[Array, "n"]) -> Cache:
    """Return a cache of its own, whose row i is a copy of row rows[i]."""
    return cache.take(rows)
