"""Time prompts and decoding of one model and its variants, by batch and context, beside the device's limits.

  jaxinfer bench smollm2-135m --context 256
  jaxinfer bench llama3-8b --random-weights --pass-set passes.txt --batch 1 --batch 16 --context 1024 --context 8192

--random-weights needs no checkpoint: MODEL is then a published shape too (llama3-8b, llama2-7b, ...), as of jaxinfer
plan, and speed is all that can be told of it. Variants are given as for jaxinfer compare, which measures quality; they
are timed in turns with the model alone. A step's share of the bandwidth is that of the bytes of weights and cache that
it must read. --out FILE also gets every result as a JSON line, with the device, versions and limits; --table FILE
prints the table of such a file and measures nothing.
"""

import argparse
import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Any

from jaxinfer.cli import options
from jaxinfer.cli.compare import read_pass_set
from jaxinfer.errors import InputError

BASELINE = "baseline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer bench`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    add = parser.add_argument
    add("--random-weights", action="store_true", help="weights drawn at random; MODEL may be a published shape")
    add("--pass-set", metavar="FILE", help="variants, one a line")
    add("--batch", action="append", type=int, metavar="N", help="rows at once; repeat for several (default: 1)")
    add("--context", action="append", type=int, metavar="N", help="prompt tokens; repeat for several (default: 1024)")
    add("--new-tokens", type=int, default=64, metavar="N", help="decode steps that are timed (default: 64)")
    add("--rounds", type=int, default=3, metavar="N", help="times that each is measured, in turns (default: 3)")
    add("--out", type=Path, metavar="FILE", help="append a JSON line a result")
    add("--table", type=Path, metavar="FILE", help="print the table of such a file")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.table is not None:
        _print_table(args.table)
        return
    options.take_positional(args)
    variants = _variants(args)
    from jaxinfer.eval import bench
    from jaxinfer.eval.bench import Workload

    workloads = [
        Workload(batch, context, args.new_tokens, args.rounds)
        for context in args.context or [1024]
        for batch in args.batch or [1]
    ]
    program = _program(args, max(w.context + w.new_tokens for w in workloads))
    bench.check(workloads, program.config.max_context)
    from jaxinfer import passes

    programs = {BASELINE: program}
    for name, specs in variants.items():
        programs[name] = passes.apply(program, *specs)
    dtype = str(program.model.embed.table.dtype)
    found = bench.limits(dtype)
    about = _about(args, dtype, found)
    rows: list[dict[str, Any]] = []
    total = len(programs) * len(workloads)
    for name, work, result in bench.bench(programs, workloads, found):
        row = {"variant": name, **dataclasses.asdict(work), **result}
        rows.append(row)
        said = result.get("error") or f"{result['step_ms']:.2f} ms a step"
        print(f"[{len(rows)}/{total}] {name}, {work.batch} x {work.context}: {said}", file=sys.stderr, flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(about | row) + "\n")
    print(f"{about['device']}: {found.bandwidth / 1e9:.0f} GB/s, {found.flops / 1e12:.4g} TFLOP/s ({found.source})")
    print(bench.table(rows, BASELINE))


def _print_table(path: Path) -> None:
    """Print the results of a file, by context and batch. Raises InputError for a line that is none."""
    from jaxinfer.eval.bench import table

    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row = {**row, "place": (row["context"], row["batch"]), "variant": str(row["variant"])}
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number}: no result of jaxinfer bench") from None
        rows.append(row)
    print(table(sorted(rows, key=lambda row: row["place"]), BASELINE))


def _variants(args: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Return the passes of each variant, by name; none is fine. Raises InputError for one name twice."""
    found = {" ".join(args.passes): tuple(args.passes)} if args.passes else {}
    for variant in read_pass_set(args.pass_set) if args.pass_set else ():
        if variant.name in found or variant.name == BASELINE:
            raise InputError(f"variant {variant.name!r}: the name is taken; give each variant its own")
        found[variant.name] = variant.passes
    from jaxinfer.passes import parse

    for specs in found.values():
        for spec in specs:
            parse(spec)
    return found


def _program(args: argparse.Namespace, tokens: int):
    """Return the model alone, in the dtype and layout that it runs in."""
    if not args.random_weights:
        args.passes = None
        return options.load(options.read_config(args), progress=sys.stderr.isatty())
    return options.random_weights(args, tokens)


def _about(args: argparse.Namespace, dtype: str, limits: Any) -> dict[str, Any]:
    """Return what every line of a run shares."""
    import jax
    import jaxlib

    from jaxinfer.eval.roofline import device_name

    versions = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    what = {"model": args.model or "smollm2-135m", "random_weights": args.random_weights, "dtype": dtype}
    return {**what, "device": device_name(), "versions": versions, "limits": dataclasses.asdict(limits)}
