"""Measure what leaving early saves: layers really run, FLOPs and time, for several batch sizes.

  jaxinfer exits smollm2-135m --pass early_exit:criterion=saturation --data text.txt
  jaxinfer exits smollm2-135m --pass w8a8 --pass skip_decode --data text.txt --batches 1,8,32 --out runs/exits

The full model has the passes that are not of the depth family; both feed the same tokens of the text, one a step, in
turns. --out gets exits.jsonl, a line a batch size, and exits.png.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from jaxinfer.cli import options
from jaxinfer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer exits`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="the text whose tokens are fed")
    parser.add_argument("--batches", default="1,4,16", metavar="N,N", help="batch sizes (default: 1,4,16)")
    for name, default, what in (
        ("prompt-tokens", 64, "tokens of each row before the steps"),
        ("steps", 64, "tokens that are fed one by one"),
        ("rounds", 3, "how often each is timed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--out", metavar="DIR", help="where exits.jsonl and exits.png go")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    options.take_positional(args)
    specs = args.passes or []
    try:
        batches = [int(b) for b in args.batches.split(",")]
    except ValueError:
        raise InputError(f"--batches {args.batches}: must be numbers such as 1,4,16") from None
    config = options.read_config(argparse.Namespace(**{**vars(args), "passes": None, "calibrate": None}))

    from jaxinfer import passes
    from jaxinfer.eval import exits, exits_plot
    from jaxinfer.eval.data import read_text
    from jaxinfer.eval.roofline import device_name
    from jaxinfer.generation import tokenizer_of
    from jaxinfer.passes.calibration import Calibration

    parsed = [passes.parse(spec) for spec in specs]
    if not any(p.about.family == "depth" for p in parsed):
        known = ", ".join(name for name, kind in passes.PASSES.items() if kind.about.family == "depth")
        raise InputError(f"no pass here makes tokens run fewer layers: give --pass with one of {known}")
    text, calibration = read_text(args.data), None if args.calibrate is None else read_text(args.calibrate)
    base = options.load(config, progress=sys.stderr.isatty())
    if calibration is not None:
        calibration = Calibration.of(base, calibration, progress=sys.stderr.isatty())
    full = passes.apply(base, *(p for p in parsed if p.about.family != "depth"), calibration=calibration)
    program = passes.apply(base, *parsed, calibration=calibration)
    tokens = tokenizer_of(base).encode(text)
    found = exits.measure_exits(
        full, program, tokens, batches, args.prompt_tokens, args.steps, args.rounds, progress=sys.stderr.isatty()
    )
    title = f"{base.name}, {' + '.join(specs)}, {device_name()}"
    print(title)
    print(exits_plot.table(found))
    if args.out:
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        lines = [{"model": base.name, "passes": specs, "device": device_name(), **dataclasses.asdict(e)} for e in found]
        (out / "exits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        exits_plot.plot(found, out / exits_plot.NAME, title)
        print(f"{out}/exits.jsonl, {out}/{exits_plot.NAME}")
