"""Plan a run on a machine that is not there: memory, collectives, the predicted times, compiled ahead of time.

jaxinfer plan llama3-70b --pass int8 --pass kv_int8 --topology v5e:4x4 --mesh model=16 --batch 32 --context 8192
jaxinfer plan config.json --topology v5p:4x4x4 --mesh data=8,model=8 --batch 64 --decoder speculative:length=4
jaxinfer plan llama3-70b --pass int8 --topology v5p:4x4x4 --mesh stage=4,model=16 --batch 64
jaxinfer plan llama3-8b --topology cpu:8 --mesh data=2,model=4 --batch 4 --context 256 --json
jaxinfer plan --sweep --model llama3-70b --topology v5e:4x4 --topology v5p:2x2x4 --mesh model=16 --batch 8 --batch 32 \\
    --pass-set passes.txt --price v5e=1.2 --price v5p=4.2 --out runs/plan

MODEL is a published shape (llama3-8b, llama3-70b, llama3-405b, qwen3-30b-a3b, qwen3-235b-a22b, llama2-7b, -13b, -70b),
a config.json or its directory, or whatever --model of the other commands takes. TPUs need libtpu (no TPU): pip install
"jaxinfer[plan]". Programs are compiled in a process of their own from cuts of one and two layers of each kind, and
scaled; --whole compiles all layers. On a mesh with stages they are layers of each stage, bytes and FLOPs are of one
device's stage, and times of all turns. --decode-only leaves the prefill out; --shapes-only compiles nothing. --sweep
plans every combination of what is repeated, writes rows to --out as they are done (a killed run goes on), and draws
pareto.png: dollars a million tokens, by --price in dollars a chip and hour, against the time of a token.
"""

import argparse
import dataclasses
import json
import sys

from jaxinfer.cli import options
from jaxinfer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer plan`."""
    add = parser.add_argument
    add("name", nargs="?", metavar="MODEL", help="a published shape, a config.json, or a model")
    add("--model", metavar="M", help="the same")
    options.add_passes(parser)
    add("--dtype", default="bfloat16", help="of weights and cache before passes (default: bfloat16)")
    add("--topology", action="append", metavar="T", help="v5e:4x4, v5p:4x4x4, v6e:16x16, tpu7x:4x4x4, h100:8, cpu:8")
    add("--mesh", action="append", metavar="M", help="data=2,model=8 (default: the model over all devices)")
    add("--rules", default=None, metavar="R", help="what lies over which axis: mixed (default), tensor, ...")
    add("--batch", action="append", type=int, metavar="N", help="rows that decode together (default: 1)")
    add("--context", type=int, default=None, metavar="N", help="tokens of each row (default: 8192, or the model's)")
    add("--prompt", type=int, default=None, metavar="N", help="tokens of a prompt (default: the context)")
    add("--decoder", default="", metavar="D", help="speculative:length=4,acceptance=0.7,draft=0.05: its gain")
    add("--decode-only", action="store_true", help="leave the prefill out")
    add("--whole", action="store_true", help="compile all layers as one program")
    add("--shapes-only", action="store_true", help="compile nothing: estimates")
    add("--json", action="store_true", help="print one JSON object")
    add("--sweep", action="store_true", help="plan every combination of what is given several times")
    add("--pass-set", metavar="FILE", help="of a sweep: variants, one a line, as in jaxinfer compare")
    add("--price", action="append", metavar="KIND=USD", help="of a sweep: dollars a chip and hour, v5e=1.2")
    add("--out", metavar="DIR", help="of a sweep: where plans.jsonl and pareto.png go")


def run(args: argparse.Namespace) -> int | None:
    """Run the command. The exit status is 3 where the program does not fit."""
    options.take_positional(args)
    if args.model is None:
        raise InputError("no model: give MODEL, such as llama3-8b or a config.json")
    if args.calibrate is not None:
        raise InputError(f"--calibrate {args.calibrate}: a plan has no weights and needs no text; leave it out")
    if args.topology is None:
        raise InputError("no topology: give --topology, such as v5e:4x4")
    for name in ("pass_set", "price", "out"):
        if getattr(args, name) is not None and not args.sweep:
            raise InputError(f"--{name.replace('_', '-')}: is for --sweep; leave it out, or add --sweep")
    if args.sweep:
        from jaxinfer.cli import plan_sweep

        return plan_sweep.run(args)
    for name in ("topology", "mesh", "batch"):
        if len(getattr(args, name) or ()) > 1:
            raise InputError(
                f"--{name}: given {len(getattr(args, name))} times; one plan has one, --sweep takes several"
            )
    return _one(args)


def base_request(args: argparse.Namespace):
    """Return the request of the options that a sweep does not vary."""
    from jaxinfer.plan.request import PHASES, Request
    from jaxinfer.plan.shapes import find_shape

    context = args.context
    if context is None:
        context = min(8192, find_shape(args.model)[0].max_context)
    request = Request(
        model=args.model,
        topology=args.topology[0],
        mesh=(args.mesh or [""])[0],
        passes=tuple(args.passes or ()),
        dtype=args.dtype,
        batch=(args.batch or [1])[0],
        context=context,
        prompt=args.prompt,
        decoder=args.decoder,
        phases=PHASES[1:] if args.decode_only else PHASES,
        whole=args.whole,
    )
    return request if args.rules is None else dataclasses.replace(request, rules=args.rules)


def _one(args: argparse.Namespace) -> int | None:
    from jaxinfer.plan.alternatives import alternatives
    from jaxinfer.plan.planning import plan
    from jaxinfer.plan.report import to_json, to_text
    from jaxinfer.plan.speculation import parse_decoder

    request = base_request(args)
    speculation = parse_decoder(request.decoder)
    shown = sys.stderr.isatty()

    def note(error: str) -> None:
        if shown:
            print("a part failed to compile" if error else "compiled a part", file=sys.stderr, flush=True)

    found = plan(request, note, compiling=not args.shapes_only)
    nearby = [] if found.memory.fits else alternatives(found)
    shape = to_json if args.json else to_text
    answer = shape(found, nearby, speculation)
    print(json.dumps(answer) if args.json else answer)
    failed = any(phase.error for phase in found.phases.values())
    return 0 if found.memory.fits and not failed else 3
