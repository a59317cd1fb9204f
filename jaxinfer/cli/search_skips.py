"""Find which layers a model can do without, as a draft or for good, and save the choice.

  jaxinfer search-skips smollm2-135m --data text.txt --count 8 --budget 40 --out skips.json
  jaxinfer generate "Once upon a time" --pass skip_layers:file=skips.json

It begins with the layers of least block influence and swaps one at a time; --budget is how many sets are tried, each
on the first --max-tokens tokens of the text. Every trial is kept beside --out (skips.jsonl), and a search that was
stopped, or that gets a larger budget, goes on from there.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

from jaxinfer.cli import options
from jaxinfer.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer search-skips`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="the text to judge on")
    parser.add_argument("--count", type=int, required=True, metavar="K", help="how many layers to leave out")
    parser.add_argument("--budget", type=int, default=40, metavar="N", help="sets to try (default: 40)")
    parser.add_argument(
        "--objective", default="agreement", metavar="O",
        help="agreement of greedy tokens, for a draft, or kl or perplexity (default: agreement)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="tokens to judge on (default: 2048)")
    parser.add_argument("--window", type=int, default=256, metavar="N", help="tokens in sight (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same search")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the choice goes: a .json file")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    options.take_positional(args)
    out = Path(args.out)
    if out.suffix != ".json":
        raise InputError(f"--out {out}: must be a .json file")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--out {out}: its directory does not exist; make it first")
    if args.max_tokens < 2:
        raise InputError(f"--max-tokens={args.max_tokens}: must be 2 or more")
    config = options.read_config(args)

    from jaxinfer.errors import nearest
    from jaxinfer.eval import journal, skip_search
    from jaxinfer.eval.data import read_text
    from jaxinfer.generation import tokenizer_of

    if args.objective not in skip_search.OBJECTIVES:
        raise InputError(f"--objective {args.objective!r}: {nearest(args.objective, skip_search.OBJECTIVES)}")
    text = read_text(args.data)
    program = options.load(config, progress=sys.stderr.isatty())
    tokens = tokenizer_of(program).encode(text)[: args.max_tokens]
    how = {"count": args.count, "objective": args.objective, "window": args.window, "seed": args.seed}
    about = {"options": how, "data": tokens, "model": journal.fingerprint(program)}
    with journal.Journal(out.with_suffix(".jsonl"), **about) as book:
        known = len(book.done)
        found = skip_search.search_skips(
            program, tokens, args.count, args.budget, args.objective, args.window, args.seed, book,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    best, layers = found.best, len(program.model.layers)
    choice = {
        "layers": list(best.layers),
        "of": layers,
        "model": program.name,
        **how,
        "tokens": len(tokens),
        "tried": found.tried,
        "best": dataclasses.asdict(best),
        "least_influence": dataclasses.asdict(found.start),
        "influence": list(found.influence),
    }
    scratch = out.with_suffix(".unfinished")
    scratch.write_text(json.dumps(choice, indent=1) + "\n")
    os.replace(scratch, out)
    for name, trial in (("least influence", found.start), ("best found", best)):
        print(
            f"{name:15s}  agreement {trial.agreement:6.2%}  KL {trial.kl:.4f}  perplexity {trial.perplexity:.4g}"
            f"  without {'+'.join(map(str, trial.layers))}"
        )
    print(f"{out}: {args.count} of {layers} layers, {found.tried} sets tried, {known} of them before")
