"""Weight-only quantization over batch and length: the layout of Table 4 of the survey (2404.14294).

    python scripts/survey_table4.py [--model smollm2-135m] [--batches 1,2,4,8,16] [--lengths 128,256,512,1024,2048]

Each cell is the speed-up over the unquantized model of prefill / decode / both together: a prompt of that length, then
--new-tokens more, in every row of the batch. Programs alternate round by round; a cell is the median of the rounds'
ratios. Prints a JSON line a case as it is measured, then a table for each variant. The shape to expect, on hardware
with room to compute: decode gains most at batch 1, less with batch and length; prefill gains nothing or loses a little.
"""

import argparse
import dataclasses
import json
import sys

import numpy as np

from jaxinfer import configuration, loading
from jaxinfer.errors import InputError
from jaxinfer.eval import roofline, speed
from jaxinfer.passes import apply, parse
from jaxinfer.program import Program

VARIANTS = ("int4:group=64", "int8")
CASES = ("prefill", "decode", "whole")


def measure(program: Program, variants: list[str], batch: int, length: int, new_tokens: int, rounds: int) -> list[dict]:
    """Return a line for each variant: its speed-ups over the program, or why there are none."""
    prompt = np.random.default_rng(0).integers(0, program.config.vocab_size, length).tolist()
    lines = []
    for spec in variants:
        line = {"variant": spec, "batch": batch, "length": length, "new_tokens": new_tokens, "rounds": rounds}
        try:
            programs = {"baseline": program, spec: apply(program, spec)}
            found = speed.measure_speed(programs, prompt, new_tokens, rounds, batch)
            for case in CASES:
                ours, base = ([getattr(r, case) for r in found[name]] for name in (spec, "baseline"))
                line[case] = dataclasses.asdict(speed.latency(ours, base))
        except Exception as e:  # out of memory is a cell, as it is in the survey
            line["error"] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        lines.append(line)
    return lines


def table(lines: list[dict], batches: list[int], lengths: list[int]) -> str:
    """Return the lines of one variant in the survey's layout: batches down, lengths across."""
    found = {(line["batch"], line["length"]): line for line in lines}

    def cell(batch: int, length: int) -> str:
        line = found[batch, length]
        if "error" in line:
            return "OOM" if "RESOURCE_EXHAUSTED" in line["error"] else "failed"
        return "/".join(f"{line[case]['ratio']:.2f}" for case in CASES)

    rows = [["B", *map(str, lengths)], *([str(b), *(cell(b, n) for n in lengths)] for b in batches)]
    return "\n".join(f"{row[0]:>3s} " + " ".join(f"{c:>15s}" for c in row[1:]) for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name, path or hub repository (default: smollm2-135m)")
    parser.add_argument("--config", help="Python file with get_config()")
    parser.add_argument("--dtype", choices=loading.DTYPES)
    parser.add_argument("--passes", default=list(VARIANTS), nargs="+", help="variants (default: %(default)s)")
    parser.add_argument("--batches", type=_numbers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=_numbers, default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    for spec in args.passes:
        parse(spec)
    config = configuration.read_config(args.config) if args.config else configuration.defaults()
    if args.model is not None:
        config.model, config.architecture = args.model, {}
    config.dtype = args.dtype or config.dtype
    program = configuration.from_config(config, progress=sys.stderr.isatty())
    about = {"model": program.name, "device": roofline.device_name(), "dtype": str(program.model.embed.table.dtype)}
    lines = []
    for batch in args.batches:
        for length in args.lengths:
            for line in measure(program, args.passes, batch, length, args.new_tokens, args.rounds):
                lines.append(about | line)
                print(json.dumps(lines[-1]), flush=True)
    for spec in args.passes:
        mine = [line for line in lines if line["variant"] == spec]
        print(f"\n{spec}: speed-up of prefill/decode/both, {about['model']} ({about['dtype']}) on {about['device']}")
        print(table(mine, args.batches, args.lengths))


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text}: each must be 1 or more")
    return numbers


if __name__ == "__main__":
    try:
        main()
    except InputError as e:
        sys.exit(f"error: {e}")
