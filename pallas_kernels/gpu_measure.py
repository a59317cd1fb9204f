"""The kernels' cases on a GPU that is here: whether they are right, and how long they take beside the machine's limits.

Times are medians over a loop inside one program, whose calls have inputs of their own: all of them together are several
times the L2 cache.
"""

import dataclasses
import functools
import math
import statistics
import threading
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
_ROUNDS, _SECONDS = 7, 0.01  # rounds, and about what half of one takes
_UNASKED = 2e-3  # seconds of turns of a loop between which the host is not asked whether there are more
_FASTEST = 3e12, 7e14  # bytes and FLOP a second, about, by which calls are counted
LOWERING = threading.Lock()  # Mosaic keeps what it is in the middle of in global variables
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
    arrays = jax.tree.map(jnp.asarray, spoiled)
    with LOWERING:
        lowered = jax.jit(lambda x: kernel.gpu(**x, **case.options, blocks=blocks)).lower(arrays)
    found = lowered.compile()(arrays)
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
        before = [np.asarray(given[name]) for name in case.donated] if case.rounded else [None] * len(kept)
        same = [is_right(*arrays) for arrays in zip(changed, map(np.asarray, kept), before, strict=True)]
        line["ok"] = all(same)
        line["changed"] = same
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        nothing = np.isneginf(other.astype(np.float32))
        error = relative_error(np.where(nothing, 0, one), np.where(nothing, 0, other))
        line["error"] = max(error, line.get("error", 0.0)) if np.isfinite(error) else float("nan")
        line["ok"] &= bool(error <= BOUNDS["bfloat16"]) and np.array_equal(np.isneginf(one.astype(np.float32)), nothing)
    return line


def is_right(found: np.ndarray, expected: np.ndarray, before: np.ndarray | None) -> bool:
    """Return whether an array is what it should be: the same, or near it where that is not what was there `before`."""
    differ = _bits(found) != _bits(expected)
    if before is None or not differ.any():
        return not differ.any()
    written = _bits(expected) != _bits(before)
    if found.dtype == np.uint8:
        found, expected = (x.view(np.dtype(jnp.float8_e4m3fn)) for x in (found, expected))
    near = relative_error(*(x[written].astype(np.float32) for x in (found, expected))) <= BOUNDS["bfloat16"]
    return near and not (differ & ~written).any()


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def ceilings() -> dict[str, float]:
    """Return what can be had of this device: bytes a second of a copy, read and written, and FLOP a second."""
    x = jnp.arange(_COPIED // 4, dtype=jnp.int32)
    copied = _loop_seconds(lambda x: x ^ 1, x)
    a, b = (jax.random.normal(jax.random.key(i), (_SIDE, _SIDE), jnp.bfloat16) for i in range(2))

    def multiply(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (a, b), _ = jax.lax.optimization_barrier((carry[0], carry[1]))
        return (a, b), (a @ b)[0, 0]

    multiplied = _loop_seconds(multiply, ((a, b), jnp.bfloat16(0)))
    return {"copy_bandwidth": 2 * x.nbytes / copied, "flops": 2 * _SIDE**3 / multiplied}


def _repeat(turns: Any, each: int, turn: Callable[[Any], Any], state: Any) -> Any:
    """Return what `turn` makes of a state, `turns * each` times; every `each` the host is asked, which takes 7 us."""

    def known(_: Any, state: Any) -> Any:
        return jax.lax.fori_loop(0, each, lambda _, s: turn(s), state)

    return jax.lax.fori_loop(0, turns, known, state)


def _loop_seconds(turn: Callable[[Any], Any], state: Any) -> float:
    """Return the seconds of a turn of a loop over a state that is changed in place, without those of a dispatch."""
    loop = jax.jit(lambda state, n: _repeat(n, 4, turn, state), donate_argnums=0)

    def seconds(turns: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        state = jax.block_until_ready(loop(state, jnp.int32(turns)))
        return time.perf_counter() - begin

    for _ in range(2):
        seconds(2)
    return statistics.median(seconds(4) - seconds(2) for _ in range(_ROUNDS)) / 8


@dataclasses.dataclass(frozen=True)
class Calls:
    """A loop of calls of one case in one program, compiled: `count` calls, each on inputs of its own, again and again.

    `run(kept, given, turns)` takes as many sets of inputs; what is `given` is donated and comes back. A turn calls each
    `each` times.
    """

    case: Case
    count: int
    each: int
    run: Callable[..., Any]
    prepare: Callable[..., Any] | None = None  # makes what a call takes of a set of inputs; is not timed


def compile_calls(run: Callable[..., Any], case: Case, prepare: Callable[..., Any] | None = None) -> Calls:
    """Compile a loop of as many calls `run(**inputs)` of a case as fill the L2 cache several times over.

    With `prepare` a call is `run(*prepare(**inputs))`, of which `run` alone is in the loop.
    What a turn takes is tied to what the turn before gave, so that it can't be computed once for all of them.
    """
    case = case.narrowed()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(case.shapes))
    size = max(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes)), 1)
    count = int(min(max(_CACHED / size, _CALLS[0]), _CALLS[1])) if size < _LARGE else 2
    took = max(case.bytes / _FASTEST[0], case.flops / _FASTEST[1], 1e-6) * count
    each = int(min(max(_UNASKED / took, 1), 32))
    call = (lambda kept, given: run(**kept, **given)) if prepare is None else (lambda kept, given: run(*kept))
    names = [name for name in case.donated if name in case.shapes]  # in the order of what a call gives back
    one = jax.jit(call)  # traced and lowered once for all calls

    @functools.partial(jax.jit, donate_argnums=1)
    def loop(kept: Any, given: Any, turns: Any) -> Any:
        def turn(carry: Any) -> Any:
            given, _ = carry
            tied, _ = jax.lax.optimization_barrier((kept, carry[1]))
            found = [one(a, b) for a, b in zip(tied, given, strict=True)]
            if case.donated:
                given = [dict(zip(names, x[-1], strict=True)) for x in found]
            firsts = [jax.tree.leaves(x)[0].ravel()[0] for x in found]
            return given, sum(x.astype(jnp.float32) for x in firsts)

        return _repeat(turns, each, turn, (given, jnp.float32(0)))

    kept, given = _split([shapes] * count, case)
    if prepare is not None:
        prepare = jax.jit(prepare)
        kept = [jax.eval_shape(prepare, **inputs) for inputs in kept]
    with LOWERING:
        lowered = loop.lower(kept, given, jax.ShapeDtypeStruct((), jnp.int32))
    return Calls(case, count, each, lowered.compile(), prepare)


def measure(calls: Calls, limits: Mapping[str, float], bytes_moved: float | None = None) -> dict[str, Any]:
    """Return the time of one of the calls and its shares of the limits; `bytes_moved` where it moves more."""
    case, count = calls.case, calls.count
    sets = [jax.tree.map(lambda x, i=i: _fill(x, i), dict(case.shapes)) for i in range(count)]
    kept, given = _split(sets, case)
    if calls.prepare is not None:
        kept = [calls.prepare(**inputs) for inputs in kept]
    del sets

    def seconds(turns: int) -> float:
        nonlocal given
        begin = time.perf_counter()
        given, salt = calls.run(kept, given, jnp.int32(turns))
        jax.block_until_ready(salt)
        return time.perf_counter() - begin

    for _ in range(2):
        seconds(1)
    turns = int(min(max(_SECONDS / max(seconds(3) / 3, 1e-6), 2), 2000))
    # Of the times of `turns` and of twice as many, the difference is free of what a dispatch costs.
    took = statistics.median(seconds(2 * turns) - seconds(turns) for _ in range(_ROUNDS))
    each = took / (turns * calls.each * count)
    moved = case.bytes if bytes_moved is None else bytes_moved
    return {
        "us": 1e6 * each,
        "bandwidth_share": moved / each / limits["copy_bandwidth"],
        "flops_share": case.flops / each / limits["flops"],
        "tflops": case.flops / each / 1e12,
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
