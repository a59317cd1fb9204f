"""The kernels' cases on a GPU that is here: whether they are right, and how long they take beside the machine's limits.

Times are medians over rounds of many calls that are enqueued together, each call on inputs of its own: all of them
together are several times the L2 cache, and the host is ahead of the device.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.tolerance import BOUNDS, relative_error

_CACHED = 400e6  # bytes that the inputs of a timed call take at least, all sets together: several times the L2 cache
_LARGE = 4e9  # bytes of inputs of which two sets are enough
_CALLS = (4, 24)  # input sets, at least and at most
_ROUNDS, _SECONDS = 7, 0.01  # rounds, and about what one takes
_COPIED = 1 << 30  # bytes of the array whose copy is timed
_SIDE = 8192  # of the matrices whose product is timed


def check(kernel: Kernel, case: Case, blocks: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Return how far a case, in bfloat16, is from its reference, with NaN wherever the kernel must not look.

    "error" is the largest difference over the largest number expected, and "ok" whether it is within the bounds.
    """
    case = case.narrowed()
    inputs = case.inputs()
    spoiled = case.spoil(inputs) if case.spoil else inputs
    blocks = case.gpu_blocks if blocks is None else blocks
    found = jax.jit(lambda x: kernel.gpu(**x, **case.options, blocks=blocks))(jax.tree.map(jnp.asarray, spoiled))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        given = spoiled if case.donated else inputs  # what is changed in place keeps what it holds
        expected = jax.jit(lambda x: kernel.reference(**x, **case.options))(jax.tree.map(jnp.asarray, inputs))
        if case.donated:
            kept = jax.jit(lambda x: kernel.reference(**x, **case.options))(jax.tree.map(jnp.asarray, given))[-1]
    found, expected = jax.tree.map(np.asarray, (found, expected))
    line: dict[str, Any] = {"ok": True}
    if case.donated:
        *found, changed = found
        *expected, _ = expected
        same = [
            np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
            for a, b in zip(changed, kept, strict=True)
        ]
        line["ok"] = all(same)
        line["changed"] = same
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        nothing = np.isneginf(other.astype(np.float32))
        error = relative_error(np.where(nothing, 0, one), np.where(nothing, 0, other))
        line["error"] = max(error, line.get("error", 0.0)) if np.isfinite(error) else float("nan")
        line["ok"] &= bool(error <= BOUNDS["bfloat16"]) and np.array_equal(np.isneginf(one.astype(np.float32)), nothing)
    return line


def ceilings() -> dict[str, float]:
    """Return what can be had of this device: bytes a second of a copy, read and written, and FLOP a second."""
    x = jnp.arange(_COPIED // 4, dtype=jnp.int32)
    copied = _seconds(jax.jit(lambda x: x ^ 1), (x,), 1)
    a, b = (jax.random.normal(jax.random.key(i), (_SIDE, _SIDE), jnp.bfloat16) for i in range(2))
    multiplied = _seconds(jax.jit(jnp.matmul), (a, b), 1)
    return {"copy_bandwidth": 2 * x.nbytes / copied, "flops": 2 * _SIDE**3 / multiplied}


@dataclasses.dataclass(frozen=True)
class Calls:
    """Many calls of one case in one program, compiled; `run` takes as many sets of inputs."""

    case: Case
    count: int
    run: Callable[..., Any]


def compile_calls(run: Callable[..., Any], case: Case) -> Calls:
    """Compile as many calls `run(**inputs)` of a case as fill the L2 cache several times over; nothing is run."""
    case = case.narrowed()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(case.shapes))
    size = max(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)), 1)
    count = int(min(max(_CACHED / size, _CALLS[0]), _CALLS[1])) if size < _LARGE else 2
    one = jax.jit(lambda kept, given: run(**kept, **given))  # traced and lowered once for all calls

    @functools.partial(jax.jit, donate_argnums=1)
    def calls(kept: Any, given: Any) -> Any:
        found = [one(a, b) for a, b in zip(kept, given, strict=True)]
        if not case.donated:
            return found, given
        return [x[0] for x in found], [dict(zip(g, x[-1], strict=True)) for g, x in zip(given, found, strict=True)]

    return Calls(case, count, calls.lower(*_split([shapes] * count, case)).compile())


def measure(calls: Calls, limits: Mapping[str, float], bytes_moved: float | None = None) -> dict[str, Any]:
    """Return the time of one of the calls and its shares of the limits; `bytes_moved` where it moves more."""
    case, count = calls.case, calls.count
    sets = [jax.tree.map(lambda x, i=i: _fill(x, i), dict(case.shapes)) for i in range(count)]
    seconds = _seconds(calls.run, _split(sets, case), count, carried=bool(case.donated))
    moved = case.bytes if bytes_moved is None else bytes_moved
    return {
        "us": 1e6 * seconds,
        "bandwidth_share": moved / seconds / limits["copy_bandwidth"],
        "flops_share": case.flops / seconds / limits["flops"],
        "tflops": case.flops / seconds / 1e12,
        "calls": count,
    }


def _split(sets: list[dict[str, Any]], case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return what calls keep of each set of inputs, and what is donated to them."""
    kept = [{name: x for name, x in inputs.items() if name not in case.donated} for inputs in sets]
    return kept, [{name: x for name, x in inputs.items() if name in case.donated} for inputs in sets]


def _fill(shape: Any, seed: int) -> jax.Array:
    """Return numbers made on the device: a host would take minutes to draw them."""
    if isinstance(shape, np.ndarray):
        return jnp.asarray(shape)
    return _numbers(shape.shape, jnp.dtype(shape.dtype), jnp.uint32(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _numbers(shape: tuple[int, ...], dtype: jnp.dtype, seed: jax.Array) -> jax.Array:
    """Return numbers without a pattern: integers of the whole range, or floats between -1 and 1."""
    x = seed * jnp.uint32(0x9E3779B9)
    for axis in range(len(shape)):
        x = (x ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x85EBCA6B + 2 * axis)
        x ^= x >> 15
    if jnp.issubdtype(dtype, jnp.integer):
        return x.astype(dtype)
    return ((x >> 8).astype(jnp.float32) * 2.0**-23 - 1).astype(dtype)


def _seconds(fn: Callable[..., Any], args: Any, calls: int, carried: bool = False) -> float:
    """Return the median seconds of one of the `calls` that `fn(*args)` makes."""
    for _ in range(2):
        found = jax.block_until_ready(fn(*args))
        if carried:
            args = (args[0], found[1])
    begin = time.perf_counter()
    found = jax.block_until_ready(fn(*args))
    args = (args[0], found[1]) if carried else args
    repeats = int(min(max(_SECONDS / (time.perf_counter() - begin), 2), 50))
    times = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for _ in range(repeats):
            found = fn(*args)
            args = (args[0], found[1]) if carried else args
        jax.block_until_ready(found)
        times.append((time.perf_counter() - begin) / repeats / calls)
    return statistics.median(times)
