"""Where the time of a decode step goes on a GPU: every kernel's, and how much of the time the device is busy.

    python scripts/profile_gpu_step.py --model llama3-8b --context 1024 "" int8 int4:group=128 int8+kv_int8

Variants are passes joined by +, "" the model alone; weights are random. All are compiled first, and then run in turns,
a loop of --steps at a time, each one dispatch. Prints a JSON line a variant: the milliseconds of a step in each round,
and their median without the first, in which XLA makes its graph of the loop; its share of the copy bandwidth by the
bytes of weights and cache that it must read, the milliseconds that kernels run in it and how many there are, both by
CUPTI in a loop of its own, and the longest of them. The cache is empty and said to hold --context tokens: what it holds
does not change the time.
"""

import argparse
import collections
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from jaxinfer import passes
from jaxinfer.decode import loop
from jaxinfer.eval import bench, roofline, size, speed
from jaxinfer.plan.shapes import find_shape
from jaxinfer.program import Program
from pallas_kernels import compat

_ROUNDS = 4  # of which the first is no part of the median
_LONGEST = 12  # kernels that are listed


def state_of(program: Program, batch: int, context: int, steps: int) -> Any:
    """Return the state of a decode loop over a cache that is said to hold `context` tokens a row."""
    cache = loop.empty_cache(program.model, batch, loop.slots_for(context + steps + 1))
    cache = type(cache)(length=jnp.full((batch,), context, jnp.int32), layers=cache.layers)
    logits = jnp.zeros((batch, program.config.vocab_size), jnp.float32)
    return jax.block_until_ready(speed.start_greedy(program, steps + 1, cache, logits))


@dataclasses.dataclass(frozen=True)
class Loop:
    """A decode loop of a program, compiled."""

    program: Program
    batch: int
    context: int
    steps: int
    run: Any

    def fresh(self) -> Any:
        """Return a state to run it on, which it consumes."""
        return state_of(self.program, self.batch, self.context, self.steps)

    def __call__(self, state: Any) -> Any:
        """Run all steps."""
        return self.run(self.program.decoder, self.program.model, state, loop.TO_THE_END)

    def seconds(self) -> float:
        """Return how long a step takes."""
        state = self.fresh()
        begin = time.perf_counter()
        jax.block_until_ready(self(state))
        return (time.perf_counter() - begin) / self.steps


def compiled(program: Program, batch: int, context: int, steps: int) -> Loop:
    """Return a program's decode loop."""
    state = state_of(program, batch, context, steps)
    run = loop.advance.lower(program.decoder, program.model, state, loop.TO_THE_END).compile()
    return Loop(program, batch, context, steps, run)


def profile(ready: Loop, rounds: list[float], bandwidth: float) -> dict[str, Any]:
    """Return the line of a loop whose steps took these seconds."""
    step = statistics.median(rounds[1:])
    program, steps = ready.program, ready.steps
    read = roofline.decode_bytes(program, size.cache_cost(program), ready.context + steps / 2, ready.batch)
    state = ready.fresh()
    kernels = compat.kernel_times(lambda: ready(state))
    summed: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
    for name, milliseconds in kernels:
        summed[name.split("(")[0][:70]][0] += 1
        summed[name.split("(")[0][:70]][1] += milliseconds
    longest = sorted(summed.items(), key=lambda item: -item[1][1])[:_LONGEST]
    return {
        "step_ms": 1e3 * step,
        "rounds_ms": [1e3 * seconds for seconds in rounds],
        "bandwidth_share": read / step / bandwidth,
        "busy_ms": sum(total for _, total in summed.values()) / steps,
        "kernels": len(kernels) / steps,
        "longest": {name: {"us": 1e3 * total / steps, "calls": count / steps} for name, (count, total) in longest},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """Return lines of one run as a Markdown table, the first one's speed as the measure of the others'."""
    rows = [
        "| variant | step | first loop | weights and cache over the copy bandwidth | kernels busy | speed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for line in lines:
        name = line["variant"].replace("baseline", "bfloat16")
        speed = lines[0]["step_ms"] / line["step_ms"]
        share = f"{line['bandwidth_share']:.0%}"
        busy = f"{line['busy_ms']:.2f} ms" if "busy_ms" in line else ""
        times = f"{line['step_ms']:.2f} ms | {line['rounds_ms'][0]:.2f} ms"
        rows.append(f"| {name} | {times} | {share} | {busy} | {speed:.2f}x |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--layers", type=int, default=None, help="only so many of the model's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--out", type=Path, default=None, help="append the lines to this file too")
    parser.add_argument("--table", type=Path, default=None, help="print the table of a file of lines")
    args = parser.parse_args(argv)
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
        return
    if jax.default_backend() != "gpu":
        parser.error(f"needs a GPU, and JAX has {jax.default_backend()!r}")
    config, _ = find_shape(args.model)
    most = max(config.max_context, args.context + args.steps + 1)
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers, max_context=most)
    base = bench.random_program(config, "bfloat16")
    limits = bench.limits("bfloat16")
    device = jax.devices()[0].device_kind
    about = {"model": args.model, "layers": config.num_layers, "batch": args.batch, "context": args.context}
    about |= {"device": device, "versions": {"jax": jax.__version__}, "limits": dataclasses.asdict(limits)}
    programs = {x: passes.apply(base, *(spec for spec in x.split("+") if spec)) for x in args.variants}
    loops = {x: compiled(program, args.batch, args.context, args.steps) for x, program in programs.items()}
    rounds: dict[str, list[float]] = {x: [] for x in loops}
    for _ in range(_ROUNDS):
        for variant, ready in loops.items():
            rounds[variant].append(ready.seconds())
    for variant, ready in loops.items():
        line = about | {"variant": variant or "baseline"}
        line |= profile(ready, rounds[variant], limits.bandwidth)
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
