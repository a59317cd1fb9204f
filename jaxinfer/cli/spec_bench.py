"""Measure drafters on questions, each answered plainly and with drafts in turns: a table by category, and a plot.

  jaxinfer spec-bench smollm2-135m --drafters ngram lookahead --pass w8a8 --data question.jsonl.gz --out runs/spec
  jaxinfer spec-bench --drafters "self:passes=int4,length=5" "exit:layers=10" --data question.jsonl.gz --per-category 5

  jaxinfer spec-bench llama3-8b --random-weights --acceptance 0.6 0.8 --draft-length 4 --context 1024

A line of --data has "category" and "turns", of which the first is asked, in the model's chat template where it
has one. Answers are greedy.
With --out every question's figures are written as they come, a second run goes on where a killed one stopped, and
spec_bench.png shows the speed-ups beside those that tokens a step and the measured costs of a step predict.
--acceptance measures steps without a drafter: each drafted token stands by that chance, whatever the model says, in a
text of --context random tokens. MODEL may then have --random-weights, and be a published shape.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from jaxinfer.cli import options
from jaxinfer.errors import InputError

_SYNTHETIC = {"draft_length": 4, "context": 1024, "texts": 3}  # options of --acceptance
# Of Spec-Bench, MT-bench's eight categories are one.
_MT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer spec-bench`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    options.add_model(parser)
    parser.add_argument("--drafters", nargs="+", metavar="D", help="as --drafter of jaxinfer generate")
    parser.add_argument("--data", metavar="FILE", help="JSON lines of questions")
    parser.add_argument("--acceptance", nargs="+", type=float, metavar="A", help="chances that a drafted token stands")
    parser.add_argument("--draft-length", type=int, metavar="N", help="with --acceptance: drafted tokens (default: 4)")
    parser.add_argument("--context", type=int, metavar="N", help="with --acceptance: prompt tokens (default: 1024)")
    parser.add_argument("--texts", type=int, metavar="N", help="with --acceptance: how many (default: 3)")
    parser.add_argument("--random-weights", action="store_true", help="with --acceptance: no checkpoint is read")
    parser.add_argument("--per-category", type=int, metavar="N", help="only the first N questions of each category")
    parser.add_argument("--categories", nargs="+", metavar="C", help="only these (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of an answer (default: 128)")
    parser.add_argument("--always", action="store_true", help="draft at every step, whether or not it is worth it")
    parser.add_argument("--out", metavar="DIR", help="where the figures and the plot go; continued if it exists")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    for name in ("per_category", "max_new_tokens", *_SYNTHETIC):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}={value}: must be 1 or more")
    _check_ways(args)
    options.take_positional(args)
    if args.acceptance:
        return _synthetic(args)
    config = options.read_config(args)
    questions = _questions(args)
    from jaxinfer.speculation import check_drafter

    for spec in args.drafters:
        check_drafter(spec)

    program = options.load(config, progress=sys.stderr.isatty())
    records = _measure(args, program, questions)
    _show(args, records, args.drafters)
    return _status(program, records)


def _show(args: argparse.Namespace, records: list[dict[str, Any]], drafters: list[str]) -> None:
    from jaxinfer.eval.spec_table import draw, markdown

    print(markdown(records, drafters))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        path = Path(args.out) / "spec_bench.png"
        draw(records, drafters, path)
        print(f"\n{path}", file=sys.stderr)


def _check_ways(args: argparse.Namespace) -> None:
    """Raise InputError unless the options are those of one of the two ways: questions, or chances."""
    if not args.acceptance:
        for name in ("drafters", "data"):
            if getattr(args, name) is None:
                raise InputError(f"--{name} is missing: give --drafters and --data, or --acceptance alone")
    others = ("drafters", "data", "per_category", "categories") if args.acceptance else (*_SYNTHETIC, "random_weights")
    for name in others:
        if getattr(args, name):
            which = "not for" if args.acceptance else "only for"
            raise InputError(f"--{name.replace('_', '-')}: is {which} --acceptance; leave it out")


def _synthetic(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from jaxinfer.eval import synthetic
    from jaxinfer.passes import apply

    given = {name: getattr(args, name) or default for name, default in _SYNTHETIC.items()}
    shape = synthetic.Shape(args.acceptance, **given, new_tokens=args.max_new_tokens, adapt=not args.always)
    if args.random_weights:
        program = options.random_weights(args, shape.context + shape.new_tokens)
        program = apply(program, *args.passes) if args.passes else program
    else:
        program = options.load(options.read_config(args), progress=sys.stderr.isatty())
    records = synthetic.measure(program, shape)
    found = list(tqdm(records, total=shape.texts * len(shape.acceptance), disable=not sys.stderr.isatty()))
    _show(args, found, [synthetic.NAME])
    return 0


def _status(program, records: list[dict[str, Any]]) -> int:
    """Return 1, and say so, where an answer of a program that rounds nothing goes another way than by a tie."""
    from jaxinfer.eval.spec_bench import TIE

    worst = max((gap for r in records for gap in r["gap"].values()), default=0.0)
    if program.passes or program.model.embed.table.dtype != "float32" or worst <= TIE:
        return 0
    print(f"jaxinfer: error: two tokens' scores differ by {worst:.1e} where answers part: no tie", file=sys.stderr)
    return 1


def _questions(args) -> list[tuple[str, str]]:
    """Return (category, question) of the rows that are asked for."""
    from jaxinfer.eval.data import at, field, read_jsonl

    found: dict[str, list[str]] = {}
    for line, row in read_jsonl(args.data):
        with at(args.data, line):
            category = field(row, "category", str, "a string")
            turns = field(row, "turns", list, "a list of questions")
            if not turns or not isinstance(turns[0], str) or not turns[0]:
                raise InputError("'turns' has no question: its first entry must be text")
            found.setdefault("mt_bench" if category in _MT else category, []).append(turns[0])
    wanted = args.categories or list(found)
    for name in wanted:
        if name not in found:
            raise InputError(f"--categories {name}: {args.data} has {', '.join(found)}")
    return [(name, question) for name in wanted for question in found[name][: args.per_category]]


def _measure(args, program, questions: list[tuple[str, str]]) -> list[dict[str, Any]]:
    import contextlib
    import dataclasses

    from tqdm import tqdm

    from jaxinfer.decode.base import Autoregressive
    from jaxinfer.eval.journal import Journal, fingerprint
    from jaxinfer.eval.spec_bench import Bench, encode_question, gap
    from jaxinfer.generation import tokenizer_of
    from jaxinfer.speculation import speculative

    tokenizer = tokenizer_of(program)
    programs = {"": program.replace(decoder=Autoregressive())}
    programs |= {spec: speculative(program, spec, adapt=not args.always) for spec in args.drafters}
    bench = Bench(programs, args.max_new_tokens)
    run = {
        "questions": questions,
        "model": fingerprint(program),
        "options": [args.drafters, args.max_new_tokens, args.always],
    }
    records: dict[int, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        journal = None
        if args.out:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            journal = stack.enter_context(Journal(Path(args.out) / "spec_bench.jsonl", **run))
            records |= journal.done
        for i, (category, question) in enumerate(tqdm(questions, unit="question", disable=not sys.stderr.isatty())):
            if i in records:
                continue
            ids = encode_question(tokenizer, question)
            answers = bench.answer(ids, turn=i)
            plain = answers[""].tokens
            records[i] = {
                "category": category,
                "prompt": len(ids),
                "answers": {name: dataclasses.asdict(a) for name, a in answers.items()},
                "gap": {name: gap(program, ids, a.tokens, plain) for name, a in answers.items() if name},
            }
            if journal is not None:
                journal.append(i, records[i])
    return [records[i] for i in sorted(records)]
