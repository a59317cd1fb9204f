"""What a program takes in memory, read off the buffers that hold it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.program import Program


@dataclasses.dataclass(frozen=True)
class CacheCost:
    """Bytes of one row's cache as `fixed + per_token * tokens`, one entry a layer.

    `fixed` is what does not grow with the row's slots: a residual buffer, a window's ring, an eviction budget.
    """

    fixed: tuple[float | int, ...]
    per_token: tuple[float | int, ...]


@dataclasses.dataclass(frozen=True)
class Size:
    """Bytes that a program takes to run a prompt and its answer, one row."""

    weight_bytes: int
    kv_bytes_per_token: float
    run_bytes: int | None  # what XLA lays out for the largest dispatch: weights, cache, temporaries
    peak_bytes: int | None  # the process's high-water mark on the device so far, all programs together; None on a CPU


def buffer_bytes(tree: Any) -> int:
    """Return the bytes that the device holds for a tree's leaves, each distinct buffer once, all local shards."""
    total, seen = 0, set()
    for leaf in jax.tree.leaves(tree):
        if id(leaf) in seen:
            continue
        seen.add(id(leaf))
        if isinstance(leaf, jax.Array):
            total += sum(shard.data.on_device_size_in_bytes() for shard in leaf.addressable_shards)
        else:
            total += int(np.prod(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
    return total


def cache_cost(program: Program, slots: int = 256) -> CacheCost:
    """Return what the cache of a row takes: the buffers of a cache of `slots` and of one of twice as many, compared."""
    small, large = (
        [buffer_bytes(layer) for layer in loop.empty_cache(program.model, 1, n).layers] for n in (slots, 2 * slots)
    )
    per_token = tuple((b - a) / slots for a, b in zip(small, large, strict=True))
    return CacheCost(tuple(a - slots * p for a, p in zip(small, per_token, strict=True)), per_token)


def measure_size(program: Program, prompt: Sequence[int], new_tokens: int) -> Size:
    """Return the sizes of a program, `run_bytes` for a prompt and `new_tokens` after it.

    `run_bytes` is compiled, not run: XLA's own account of arguments, results and temporaries.
    """
    return Size(
        weight_bytes=buffer_bytes(program.model),
        kv_bytes_per_token=sum(cache_cost(program).per_token),
        run_bytes=_run_bytes(program, prompt, new_tokens),
        peak_bytes=peak_bytes(),
    )


def peak_bytes() -> int | None:
    """Return the most bytes that this process has held on its fullest local device, or None where none says so."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks, default=None)


def _run_bytes(program: Program, prompt: Sequence[int], new_tokens: int) -> int | None:
    """Return the bytes of the larger of a prefill chunk and a decode step."""
    cache = jax.eval_shape(lambda: program.model.init_cache(1, loop.slots_for(len(prompt) + new_tokens)))
    widest = max((tokens.shape[1] for _, tokens, _ in loop.chunks([prompt])), default=1)
    sizes = [_planned(program, cache, tokens) for tokens in {widest, 1}]
    return None if None in sizes else max(sizes)


def _planned(program: Program, cache: Cache, tokens: int) -> int | None:
    shape = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    counts = jax.ShapeDtypeStruct((1,), jnp.int32)
    plan = jax.jit(_step, donate_argnums=1).lower(program.model, cache, shape, counts).compile().memory_analysis()
    if plan is None:
        return None
    out = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return plan.argument_size_in_bytes + out + plan.temp_size_in_bytes


def _step(model, cache, tokens, counts):
    hidden, cache = model(tokens, cache, counts)
    return cache, model.logits(hidden[:, -1:])
