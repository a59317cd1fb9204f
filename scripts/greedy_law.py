"""Whether drafts leave greedy answers as they are: every drafter against plain decoding, over the questions of a file.

    python scripts/greedy_law.py --data question.jsonl.gz --drafters ngram lookahead [--pass kv_int8] --out runs/law

Rows of a batch are answered together, plainly and with each drafter, which drafts at every step, worth it or not. Where
answers part, the scores of the two tokens there are compared: less than 1e-3 apart in float32 is a tie, which rounding
decides, and more is an error (status 1). Batches are written as they are done; a killed run goes on.
"""

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: list[str] | None = None) -> int:
    """Answer, compare, and print a line a drafter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", required=True, help="JSON lines with 'turns', of which the first is asked")
    parser.add_argument("--drafters", nargs="+", required=True)
    parser.add_argument("--pass", dest="passes", action="append", default=[])
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)

    from tqdm import tqdm

    import jaxinfer as ji
    from jaxinfer.decode.base import Autoregressive
    from jaxinfer.eval.data import read_jsonl
    from jaxinfer.eval.journal import Journal, fingerprint
    from jaxinfer.eval.spec_bench import TIE, encode_question, gap

    questions = [row["turns"][0] for _, row in read_jsonl(args.data)]
    program = ji.apply(ji.load(args.model), *args.passes) if args.passes else ji.load(args.model)
    plain = program.replace(decoder=Autoregressive())
    others = {spec: ji.speculative(program, spec, adapt=False) for spec in args.drafters}
    # In order of their length: rows of a batch are then alike.
    prompts = sorted((encode_question(program.tokenizer, q) for q in questions), key=len)
    step = max(1, len(prompts) // args.questions)
    prompts = prompts[::step][: args.questions]
    batches = [prompts[i : i + args.batch_size] for i in range(0, len(prompts), args.batch_size)]
    found: dict[int, dict] = {}
    with contextlib.ExitStack() as stack:
        journal = None
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            run = dict(model=fingerprint(program), options=[args.drafters, args.max_new_tokens], prompts=prompts)
            journal = stack.enter_context(Journal(args.out / "greedy_law.jsonl", **run))
            found |= journal.done
        for i, rows in enumerate(tqdm(batches, unit="batch")):
            if i in found:
                continue
            expected = _answers(ji, plain, rows, args.max_new_tokens)
            gaps = {}
            for name, drafting in others.items():
                answers = _answers(ji, drafting, rows, args.max_new_tokens)
                gaps[name] = [
                    None if answer == other else gap(plain, row, answer, other)
                    for row, answer, other in zip(rows, answers, expected, strict=True)
                ]
            found[i] = gaps
            if journal is not None:
                journal.append(i, gaps)
    worst = 0.0
    for name in others:
        gaps = [g for i in sorted(found) for g in found[i][name]]
        parted = [g for g in gaps if g is not None]
        worst = max([worst, *parted])
        same = f"{len(gaps) - len(parted)} of {len(gaps)} answers the same"
        print(f"{name}: {same}; largest gap {max(parted, default=0):.1e}")
    if worst > TIE and not program.passes:
        print(f"greedy_law: error: scores {worst:.1e} apart where answers part: no tie", file=sys.stderr)
        return 1
    return 0


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
