"""Measure a model: perplexity of a text, or accuracy on HellaSwag or LAMBADA.

  jaxinfer eval --task perplexity --data wikitext.txt --window 512
  jaxinfer eval --task hellaswag --data val.jsonl.gz --limit 200 --out scores.jsonl

Data is text for perplexity and JSON lines for the tasks, plain or compressed (.gz, .xz). With --out, every item's
score is written as it comes, and a second run computes only what is missing.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from jaxinfer.cli import options
from jaxinfer.errors import InputError

TASKS = ("perplexity", "hellaswag", "lambada")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer eval`."""
    parser.add_argument("--task", required=True, choices=TASKS, help="what to measure")
    parser.add_argument("--data", required=True, metavar="FILE", help="what to measure it on")
    options.add_model(parser)
    options.add_mesh(parser)
    options.add_distributed(parser)
    parser.add_argument("--window", type=int, metavar="N", help="perplexity: tokens scored together (default: 512)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="perplexity: only the first N tokens of the text")
    parser.add_argument("--limit", type=int, metavar="N", help="tasks: only the first N rows")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="sequences at a time (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="every item's score, as JSON lines; continued if it exists")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    text = args.task == "perplexity"
    for name in ("window", "max_tokens", "limit", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
    for name in ("limit",) if text else ("window", "max_tokens"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name.replace('_', '-')}: not an option of --task {args.task}; leave it out")
    options.join(args)
    config = options.read_config(args)
    data = _read(args)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise InputError(f"{args.out}: its directory does not exist; make it first")

    import jax

    from jaxinfer.cli.timing import compile_seconds
    from jaxinfer.eval import journal

    program = options.load(config, progress=sys.stderr.isatty())
    how = {"task": args.task, "window": args.window or 512, "max_tokens": args.max_tokens} if text else args.task
    with contextlib.ExitStack() as stack:
        book = None
        if args.out:
            run = {"task": how, "data": data, "model": journal.fingerprint(program)}
            book = stack.enter_context(journal.Journal(options.shared(args.out), **run))
        resumed = len(book.done) if book else 0
        begin, compiled = time.perf_counter(), compile_seconds()
        report = _measure(args, program, data, book)
        seconds, compiling = time.perf_counter() - begin, compile_seconds() - compiled
    report |= {
        "data": args.data,
        "model": program.name,
        "dtype": journal.dtype_of(program),
        "device": jax.devices()[0].device_kind,
        "seconds": round(seconds, 3),
        "compile_seconds": round(compiling, 3),
        "tokens_per_second": round(report["tokens_computed"] / max(seconds - compiling, 1e-9), 1),
        "resumed": resumed,
    }
    print(json.dumps(_finite(report)) if args.json else _table(report))


def _read(args: argparse.Namespace) -> Any:
    """Return the text, or the rows, with every row checked: a mistake in the last one is told before the work."""
    from jaxinfer.eval import data, tasks

    if args.task == "perplexity":
        return data.read_text(args.data)
    parse = tasks.hellaswag_question if args.task == "hellaswag" else tasks.lambada_question
    rows = data.read_jsonl(args.data)
    for line, row in rows:
        with data.at(args.data, line):
            parse(row)
    return [row for _, row in rows]


def _measure(args: argparse.Namespace, program, data: Any, book) -> dict[str, Any]:
    from jaxinfer.eval import perplexity, tasks
    from jaxinfer.generation import tokenizer_of

    shared = {"batch_size": args.batch_size, "progress": sys.stderr.isatty(), "journal": book}
    if args.task == "perplexity":
        tokens = tokenizer_of(program).encode(data)[: args.max_tokens]
        result = perplexity.score_text(program, tokens, args.window or 512, **shared)
        return {
            "task": "perplexity",
            "n": result.tokens_scored,
            "metrics": {"perplexity": result.value},
            "stderr": {"perplexity": result.stderr},
            "tokens_computed": result.tokens_computed,
        }
    result = getattr(tasks, args.task)(program, data, args.limit, **shared)
    return dataclasses.asdict(result)


def _table(report: dict[str, Any]) -> str:
    of = "tokens" if report["task"] == "perplexity" else "rows"
    lines = [f"{report['task']} of {report['model']} ({report['dtype']}, {report['device']}) on {report['data']}"]
    lines += [f"  {'metric':12s} {'value':>10s} {'stderr':>10s}"]
    lines += [f"  {k:12s} {value:10.4f} {report['stderr'][k]:10.4f}" for k, value in report["metrics"].items()]
    rest = f", {report['resumed']} items taken from --out" if report["resumed"] else ""
    speed = f"{report['seconds']:.1f} s ({report['compile_seconds']:.1f} s of it compiling)"
    speed += f", {report['tokens_per_second']:.0f} tokens/s"
    return "\n".join([*lines, f"  {report['n']} {of} scored in {speed}{rest}"])


def _finite(value: Any) -> Any:
    """Return `value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
