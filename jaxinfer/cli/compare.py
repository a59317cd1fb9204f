"""Compare passes on one model: quality, size and speed of every variant, in one table.

  jaxinfer compare smollm2-135m --pass int4:group=64 --pass kv_int8 --out runs/one
  jaxinfer compare --pass-set passes.txt --tasks perplexity,lambada --max-tokens 20000 --limit 200 --out runs/many
  jaxinfer compare --markdown --out runs/many

All --pass together are one variant. A line of --pass-set is one: `name = int4:group=64 kv_int8`, or only the passes;
# begins a comment. --data is a folder with wikitext2/*valid*, lambada/* and hellaswag/*, or TASK=FILE, repeated.
--out gets results.jsonl, a line a variant, and pareto.png; a run that was killed goes on where it was, and variants
that the file has are not measured again. --markdown only prints the table of what --out has.
"""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

from jaxinfer.cli import options
from jaxinfer.errors import InputError, nearest
from jaxinfer.eval.results import NAME as RESULTS
from jaxinfer.eval.results import TASKS, Settings, Variant, read_results

_PLACES = {"perplexity": "wikitext2/*valid*", "lambada": "lambada/*", "hellaswag": "hellaswag/*"}
_COUNTS = {
    "window": "tokens of text that are predicted together",
    "max_tokens": "only the first N tokens of the text",
    "limit": "only the first N rows of each task",
    "batch_size": "windows or questions at a time",
    "prompt_tokens": "length of the timed prompt",
    "decode_tokens": "new tokens that are timed after it",
    "rounds": "how often each variant is timed, in turns with the baseline",
    "seed": "draws the timed prompt where the text is too short",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer compare`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    options.add_mesh(parser)
    options.add_distributed(parser)
    parser.add_argument("--pass-set", metavar="FILE", help="variants, one a line")
    parser.add_argument("--tasks", metavar="A,B", help=f"of {', '.join(TASKS)} (default: perplexity)")
    parser.add_argument("--data", action="append", metavar="DIR", help="folder of the tasks' files, or TASK=FILE")
    defaults = {f.name: f.default for f in dataclasses.fields(Settings)}
    for name, what in _COUNTS.items():
        shown = "all" if defaults[name] is None else defaults[name]
        parser.add_argument(_flag(name), type=int, metavar="N", help=f"{what} (default: {shown})")
    parser.add_argument("--out", required=True, metavar="DIR", help="where results.jsonl and pareto.png go")
    parser.add_argument("--markdown", action="store_true", help="print the table of --out in Markdown, measure nothing")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.markdown:
        _print_markdown(args)
        return
    options.take_positional(args)
    options.join(args)
    settings = _settings(args)
    variants = _variants(args)
    data = _read_data(args)
    # The baseline is the model without --pass; the passes of a --config are part of it.
    config = options.read_config(argparse.Namespace(**{**vars(args), "passes": None, "calibrate": None}))

    from jaxinfer.eval.compare import check, compare
    from jaxinfer.eval.data import read_text
    from jaxinfer.eval.plot import NAME, plot
    from jaxinfer.eval.table import terminal
    from jaxinfer.passes import parse
    from jaxinfer.passes.base import Calibrated
    from jaxinfer.passes.calibration import Calibration

    check(variants, data)
    text = None if args.calibrate is None else read_text(args.calibrate)
    if text is not None and not any(isinstance(parse(spec), Calibrated) for v in variants for spec in v.passes):
        raise InputError(f"--calibrate {args.calibrate}: no pass here looks at text; leave it out")
    tty, out = sys.stderr.isatty(), Path(options.shared(str(Path(args.out) / RESULTS))).parent
    program = options.load(config, progress=tty)
    calibration = None
    if text is not None:
        c = config.calibration
        window = min(c.window, program.config.max_context)
        calibration = Calibration.of(program, text, c.windows, window, settings.batch_size, progress=tty)
    compare(
        program,
        variants,
        data,
        out,
        settings=settings,
        calibration=calibration,
        command=_command(args),
        note=lambda line: print(line, file=sys.stderr, flush=True),
        progress=tty,
    )
    rows = read_results(out)
    print(terminal(rows))
    path = out / NAME
    plot(rows, path)
    print(f"{path.parent / RESULTS} and {path}", file=sys.stderr)


def _print_markdown(args: argparse.Namespace) -> None:
    from jaxinfer.eval.table import markdown

    asked = ("name", "model", "mesh", "passes", "pass_set", "tasks", "data", "calibrate", *_COUNTS)
    for name in asked:
        if getattr(args, name) is not None:
            what = {"name": "MODEL", "passes": "--pass"}.get(name, _flag(name))
            raise InputError(f"{what}: --markdown measures nothing, it prints what --out has; leave one of them out")
    print(markdown(read_results(args.out)))


def _settings(args: argparse.Namespace) -> Settings:
    given = {name: getattr(args, name) for name in _COUNTS if getattr(args, name) is not None}
    for name, value in given.items():
        if value < 1 and name != "seed":
            raise InputError(f"{_flag(name)}={value}: must be 1 or more")
    return Settings(**given)


def _variants(args: argparse.Namespace) -> list[Variant]:
    variants = [Variant(" ".join(args.passes), tuple(args.passes))] if args.passes else []
    if args.pass_set is not None:
        variants += read_pass_set(args.pass_set)
    if not variants:
        raise InputError("nothing to compare: give --pass, or --pass-set FILE; jaxinfer passes lists them")
    return variants


def read_pass_set(path: str) -> list[Variant]:
    """Return the variants of a file, one a line: `name = pass pass ...`, or the passes alone, which then name it.

    Raises:
        InputError: the file can't be read, or a line has a name and no passes.
    """
    from jaxinfer.eval.data import at, read_text

    variants = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, equals, rest = line.partition("=")
        if not equals or ":" in name:  # the = of an option, not that of a name
            name, rest = line, line
        with at(path, number):
            if not rest.split() or not name.strip():
                raise InputError(f"{line!r}: must be name = pass pass ..., or pass pass ...")
        variants.append(Variant(" ".join(name.split()), tuple(rest.split())))
    return variants


def _read_data(args: argparse.Namespace) -> dict[str, Any]:
    """Return each task's text or rows, every row checked: a mistake in the last one is told before the work."""
    from jaxinfer.eval import data, tasks

    chosen = [name.strip() for name in (args.tasks or "perplexity").split(",")]
    for name in chosen:
        if name not in TASKS:
            raise InputError(f"--tasks: no task {name!r}: {nearest(name, TASKS)}")
    files = _files(args, chosen)
    found: dict[str, Any] = {}
    for name in dict.fromkeys(chosen):
        if name == "perplexity":
            found[name] = data.read_text(files[name])
            continue
        parse = tasks.hellaswag_question if name == "hellaswag" else tasks.lambada_question
        rows = data.read_jsonl(files[name])
        for line, row in rows:
            with data.at(files[name], line):
                parse(row)
        found[name] = [row for _, row in rows]
    return found


def _files(args: argparse.Namespace, chosen: list[str]) -> dict[str, Path]:
    """Return the file of each chosen task."""
    from jaxinfer.paths import data_dir

    files: dict[str, Path] = {}
    folder = data_dir()
    for value in args.data or ():
        task, equals, file = value.partition("=")
        if equals and task in TASKS:
            files[task] = Path(file)
        elif Path(value).is_dir():
            folder = Path(value)
        else:
            raise InputError(
                f"--data {value}: no such folder; give one, or TASK=FILE with a task of {', '.join(TASKS)}"
            )
    for task in chosen:
        if task not in files:
            matches = sorted(folder.glob(_PLACES[task])) if folder is not None else []
            if not matches:
                where = "no folder is given" if folder is None else f"{folder} has no {_PLACES[task]}"
                raise InputError(f"no data for {task}: {where}; give --data {task}=FILE")
            files[task] = matches[0]
    return files


def _command(args: argparse.Namespace) -> str:
    """Return the command that asks for this comparison."""
    words = ["jaxinfer", "compare"]
    names = {"passes": "--pass"}
    for name in ("model", "config", "dtype", "passes", "pass_set", "tasks", "data", "calibrate", *_COUNTS, "out"):
        value = getattr(args, name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            words += [names.get(name, _flag(name)), str(one)]
    return shlex.join(words)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
