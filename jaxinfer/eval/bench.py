"""How fast variants of one program run prompts and decode, by batch and context, beside the device's own limits."""

import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.errors import InputError
from jaxinfer.eval import roofline, size, speed
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import build
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.program import Program

_LAYOUTS = ("fused", "long_last")  # of random weights
_ROOM = 0.9  # of the device's memory: what programs and their caches may take together


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the device can do at most: measured, where it is a GPU, by a copy and by a product in the same run."""

    bandwidth: float  # bytes a second
    flops: float  # FLOP a second
    source: str


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is timed: `batch` rows of `context` prompt tokens, and `new_tokens` after them."""

    batch: int
    context: int
    new_tokens: int = 64
    rounds: int = 3


def random_program(config: ModelConfig, dtype: str, seed: int = 0) -> Program:
    """Return a program of an architecture with random weights, drawn on the device leaf by leaf, laid out for speed."""
    keys = map(np.uint32, itertools.count(seed))

    def make(shape: tuple[int, ...], leaf_dtype: jnp.dtype) -> jax.Array:
        if len(shape) == 1 and leaf_dtype == jnp.float32:
            return jnp.ones(shape, leaf_dtype)
        return _draw(next(keys), shape, jnp.dtype(leaf_dtype), config.embed_dim**-0.5)

    model = build(config, make, jnp.dtype(dtype))
    for i, layer in enumerate(model.layers):
        model.layers[i] = apply_layouts(layer, _LAYOUTS)
    return Program(model, layouts=_LAYOUTS, name="random weights")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(seed: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, scale: float) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype) * jnp.asarray(scale, dtype)


def limits(dtype: str) -> Limits:
    """Return the device's limits."""
    if jax.default_backend() == "gpu":
        from pallas_kernels.gpu_measure import ceilings

        found = ceilings()
        return Limits(found["copy_bandwidth"], found["flops"], "a copy and a bfloat16 product, measured in this run")
    machine = roofline.machine(dtype)
    return Limits(machine.bandwidth, machine.flops, machine.source)


def bench(
    programs: Mapping[str, Program], workloads: Sequence[Workload], limits: Limits
) -> Iterator[tuple[str, Workload, dict[str, Any]]]:
    """Yield a result for each workload and program, those of a workload timed in turns.

    A result has the tokens a second of prefill and decode, the milliseconds of a decode step, the bytes that it must
    read, its share of the bandwidth and the prefill's of the FLOPs; or "error", why there are none.
    """
    for work in workloads:
        able = {}
        for name, program in programs.items():
            why = _too_large(programs, program, work)
            if why is None:
                able[name] = program
            else:
                yield name, work, {"error": why}
        if not able:
            continue
        prompt = np.random.default_rng(0).integers(0, next(iter(able.values())).config.vocab_size, work.context)
        try:
            rounds = speed.measure_speed(able, prompt.tolist(), work.new_tokens, work.rounds, work.batch)
        except jax.errors.JaxRuntimeError as error:
            for name in able:
                yield name, work, {"error": " ".join(str(error).split())[:200]}
            continue
        for name, program in able.items():
            yield name, work, _result(program, work, rounds[name], limits)


def _result(program: Program, work: Workload, rounds: list[speed.Round], limits: Limits) -> dict[str, Any]:
    step = statistics.median(r.decode / (r.decoded / work.batch) for r in rounds)
    prefill = statistics.median(r.prefill for r in rounds)
    read = roofline.decode_bytes(program, size.cache_cost(program), work.context + work.new_tokens / 2, work.batch)
    flops = work.batch * roofline.prefill_flops(program, work.context)
    return {
        "prefill_tokens_per_second": work.batch * work.context / prefill,
        "decode_tokens_per_second": work.batch / step,
        "step_ms": 1e3 * step,
        "step_bytes": read,
        "bandwidth_share": read / step / limits.bandwidth,
        "flops_share": flops / prefill / limits.flops,
    }


def _too_large(programs: Mapping[str, Program], program: Program, work: Workload) -> str | None:
    """Return why a workload does not fit this device's memory, or None where it does or nothing is known of it."""
    stats = jax.devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit")
    if memory is None:
        return None
    slots = loop.slots_for(work.context + work.new_tokens)
    cache = jax.eval_shape(lambda: program.model.init_cache(work.batch, slots))
    weights = size.buffer_bytes([p.model for p in programs.values()])
    need = weights + size.buffer_bytes(cache)
    if need <= _ROOM * memory:
        return None
    return f"needs {need / 1e9:.0f} GB of weights and cache, and the device has {memory / 1e9:.0f}"


def table(rows: Sequence[Mapping[str, Any]], baseline: str) -> str:
    """Return rows, `{"variant", "batch", "context", ...}` each, as a Markdown table, with speeds by the baseline's."""
    lines = ["| variant | batch | context | prefill tok/s | decode tok/s | step | of the bandwidth | vs baseline |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    base = {(r["batch"], r["context"]): r for r in rows if r["variant"] == baseline and "error" not in r}
    for row in rows:
        place = f"| {row['variant']} | {row['batch']} | {row['context']} |"
        if "error" in row:
            lines.append(f"{place} {row['error']} | | | | |")
            continue
        other = base.get((row["batch"], row["context"]))
        ratio = "" if other is None else f"{other['step_ms'] / row['step_ms']:.2f}x"
        share = f"{row['bandwidth_share']:.0%}" if "bandwidth_share" in row else ""
        rate = f"{row['prefill_tokens_per_second']:,.0f}" if "prefill_tokens_per_second" in row else ""
        lines.append(
            f"{place} {rate} | {row['decode_tokens_per_second']:,.1f} | {row['step_ms']:.2f} ms | {share} | {ratio} |"
        )
    return "\n".join(lines)


def check(workloads: Sequence[Workload], context: int) -> None:
    """Raise InputError for a workload that the model's context does not hold, or a count below 1."""
    for work in workloads:
        for field in dataclasses.fields(work):
            if getattr(work, field.name) < 1:
                raise InputError(f"{field.name}={getattr(work, field.name)}: must be 1 or more")
        if work.context + work.new_tokens > context:
            raise InputError(
                f"a context of {work.context} and {work.new_tokens} new tokens: the model's context is {context}"
            )
