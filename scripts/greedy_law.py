"""Whether drafts leave greedy answers as they are: every drafter against plain decoding, over the questions of a file.

    python scripts/greedy_law.py --data question.jsonl.gz --drafters ngram lookahead [--pass kv_int8] --out runs/law
    python scripts/greedy_law.py --model DIR --pass-set passes.txt --max-prompt-tokens 400 --data ... --drafters ...

Rows of a batch are answered together, plainly and with each drafter, which drafts at every step, worth it or not. Where
answers part, the scores of the two tokens there are compared: less than 1e-3 apart in float32 is a tie, which rounding
decides, and more is an error (status 1), but under passes that round what is computed on the way: there a last bit of
a float can become a whole step of the rounding. --pass-set holds variants, one a line, as for jaxinfer compare. Batches
are written as they are done; a killed run goes on.
"""

import argparse
import contextlib
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str] | None = None) -> int:
    """Answer, compare, and print a line a variant and drafter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="JSON lines with 'turns', of which the first is asked")
    parser.add_argument("--drafters", nargs="+", required=True)
    parser.add_argument("--pass", dest="passes", action="append", default=[])
    parser.add_argument("--pass-set", metavar="FILE", help="variants, one a line, in turn")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-prompt-tokens", type=int, help="of a longer question, its last ones")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)

    import jaxinfer as ji
    from jaxinfer.cli.compare import read_pass_set
    from jaxinfer.errors import InputError
    from jaxinfer.eval.data import read_jsonl
    from jaxinfer.eval.spec_bench import TIE, encode_question
    from jaxinfer.passes import parse

    questions = [row["turns"][0] for _, row in read_jsonl(args.data)]
    variants = [(x.name, x.passes) for x in read_pass_set(args.pass_set)] if args.pass_set else []
    if args.passes or not variants:
        variants.insert(0, (" ".join(args.passes) or "no pass", args.passes))
    base = ji.load(args.model)
    for spec in args.drafters:
        ji.speculative(base, spec)  # a mistake is told before the work; what a variant refuses is told in its turn
    # In order of their length: rows of a batch are then alike.
    prompts = sorted((encode_question(base.tokenizer, q) for q in questions), key=len)
    step = max(1, len(prompts) // args.questions)
    cut = -args.max_prompt_tokens if args.max_prompt_tokens else None
    prompts = [prompt[cut:] for prompt in prompts[::step][: args.questions]]
    status = 0
    for name, passes in variants:
        program = ji.apply(base, *passes) if passes else base
        others = {}
        for spec in args.drafters:
            try:
                others[spec] = ji.speculative(program, spec, adapt=False)
            except InputError as refusal:
                print(f"{name}, {spec}: refused: {refusal}", flush=True)
        for drafter, gaps in law(program, others, name, prompts, args).items():
            parted = [g for g in gaps if g is not None]
            same = f"{len(gaps) - len(parted)} of {len(gaps)} answers the same"
            print(f"{name}, {drafter}: {same}; largest gap {max(parted, default=0):.1e}", flush=True)
            if max(parted, default=0) > TIE and not any(parse(spec).about.rounds_activations for spec in passes):
                print(f"greedy_law: error: {drafter}: scores {max(parted):.1e} apart: no tie", file=sys.stderr)
                status = 1
    return status


def law(
    program, others: dict, name: str, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, list[float | None]]:
    """Return for each drafter by how much the scores differ where a prompt's answers part; None: they are the same."""
    from tqdm import tqdm

    import jaxinfer as ji
    from jaxinfer.decode.base import Autoregressive
    from jaxinfer.eval.journal import Journal, fingerprint
    from jaxinfer.eval.spec_bench import gap

    plain = program.replace(decoder=Autoregressive())
    batches = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
    found: dict[int, dict] = {}
    with contextlib.ExitStack() as stack:
        journal = None
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            run = dict(model=fingerprint(program), options=[[*others], args.max_new_tokens], prompts=prompts)
            path = args.out / f"greedy_law-{re.sub(r'[^A-Za-z0-9_]+', '-', name)}.jsonl"
            journal = stack.enter_context(Journal(path, **run))
            found |= journal.done
        for i, rows in enumerate(tqdm(batches, desc=name, unit="batch")):
            if i in found:
                continue
            expected = _answers(ji, plain, rows, args.max_new_tokens)
            gaps = {}
            for drafter, drafting in others.items():
                answers = _answers(ji, drafting, rows, args.max_new_tokens)
                gaps[drafter] = [
                    None if answer == other else gap(plain, row, answer, other)
                    for row, answer, other in zip(rows, answers, expected, strict=True)
                ]
            found[i] = gaps
            if journal is not None:
                journal.append(i, gaps)
    return {drafter: [g for i in sorted(found) for g in found[i][drafter]] for drafter in others}


def _answers(ji, program, rows: list[list[int]], new: int) -> list[list[int]]:
    out = ji.generate(program, rows, max_new_tokens=new)
    return [row[:n].tolist() for row, n in zip(out.tokens, out.lengths, strict=True)]


if __name__ == "__main__":
    from jaxinfer.errors import InputError

    try:
        sys.exit(main())
    except InputError as error:
        print(f"greedy_law: error: {error}", file=sys.stderr)
        sys.exit(2)
