"""Apply passes to a model and save the program: it loads ready to run, packed as the passes left it.

jaxinfer apply smollm2-135m --pass int4:group=64 --pass kv_int8 --out smollm2-int4
jaxinfer apply smollm2-135m --pass gptq --calibrate text.txt --calibration-dir work --out smollm2-gptq
jaxinfer generate "Once upon a time" --model smollm2-int4
"""

import argparse
import sys
from pathlib import Path

from jaxinfer.cli import options
from jaxinfer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer apply`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    options.add_mesh(parser)
    parser.add_argument("--calibration-windows", type=int, metavar="N", help="windows of text to calibrate on")
    parser.add_argument("--calibration-window", type=int, metavar="N", help="tokens of each window")
    parser.add_argument("--calibration-dir", metavar="DIR", help="keep finished layers here; a killed run goes on")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the program goes; must not exist")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    options.take_positional(args)
    config = options.read_config(args)
    for key, value in (
        ("windows", args.calibration_windows),
        ("window", args.calibration_window),
        ("directory", args.calibration_dir),
    ):
        if value is not None:
            if not config.calibration.text:
                raise InputError("--calibration options need a text: give --calibrate FILE")
            config.calibration[key] = value
    if not config.passes:
        raise InputError("no passes to apply: give --pass NAME (jaxinfer passes lists them)")
    if Path(args.out).exists():
        raise InputError(f"--out {args.out}: exists; choose another directory, or remove it first")

    from jaxinfer.loading import save
    from jaxinfer.ops.quantized import nbytes

    program = options.load(config, progress=sys.stderr.isatty())
    path = save(program, args.out)
    stored = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    names = " + ".join(name for name, _ in program.passes)
    print(f"{path}: {names}, {nbytes(program.model) / 1e6:.1f} MB of weights, {stored / 1e6:.1f} MB on disk")
