"""Continue a prompt, streaming to the terminal, or every prompt of a file.

  jaxinfer generate "Once upon a time"
  jaxinfer generate "What is the capital of France?" --chat
  jaxinfer generate "How can I sleep better?" --skeleton
  jaxinfer generate --prompts prompts.jsonl --batch-size 8 --out answers.jsonl

A line of --prompts is {"prompt": TEXT}, with an "id" if wanted. A line of --out has index (of the prompt), id, prompt,
text, tokens (how many were generated), finish ("stop" or "length") and run, a hash of what the answers depend on.
Lines are written batch by batch, short prompts first. A second run continues the file; the answers do not depend on
--batch-size or on interruptions: prompt number i is drawn with seed + i.

--skeleton asks the model for the points of its answer first, and then writes all of them out as one batch, each up to
--max-new-tokens (Skeleton-of-Thought). No point sees another, so it suits answers whose points stand alone.
"""

import argparse
import sys
from pathlib import Path

from jaxinfer.cli import options
from jaxinfer.errors import InputError

_LOOK = 16  # tokens of a batch between two looks at stop strings and Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer generate`."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="text to continue; - reads it from stdin")
    options.add_model(parser)
    options.add_mesh(parser)
    options.add_distributed(parser)
    options.add_generating(parser)
    parser.add_argument("--chat", action="store_true", help="ask as a user, in the model's chat template")
    parser.add_argument("--skeleton", action="store_true", help="ask for an outline, then write its points all at once")
    parser.add_argument(
        "--time-saved", action="store_true",
        help="with --skeleton: also write the points one after the other, several times in turns, and compare",
    )  # fmt: skip
    parser.add_argument("--prompts", metavar="FILE", help="JSON lines of prompts, may be .gz or .xz")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="where the answers to --prompts go")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either a PROMPT or --prompts FILE; see jaxinfer generate --help")
    if (args.prompts is None) != (args.out is None):
        raise InputError("--prompts FILE and --out FILE need each other; see jaxinfer generate --help")
    if args.skeleton and args.prompts is not None:
        raise InputError("--skeleton answers one PROMPT, not --prompts FILE; leave one of them out")
    if args.time_saved and not args.skeleton:
        raise InputError("--time-saved compares two ways to write a skeleton's points; add --skeleton")
    if args.batch_size < 1:
        raise InputError(f"batch_size={args.batch_size}: must be 1 or more")
    options.join(args)
    config = options.read_config(args)
    generating = options.generating(args, config)
    sampling = generating.sampling()
    if args.prompts is None:
        _one(args, config, generating, sampling)
    else:
        _many(args, config, generating, sampling)


def _one(args, config, generating: options.Generating, sampling) -> None:
    """Stream the continuation of one prompt to stdout, and what it took to stderr."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt:
        raise InputError("the prompt is empty: give at least one character")
    program = options.load(config, progress=sys.stderr.isatty())
    if args.skeleton:
        from jaxinfer.cli import skeleton

        if skeleton.answer(program, prompt, generating, sampling, args.time_saved):
            return
        print("the model gave no outline of two points or more; it answers as usual", file=sys.stderr)
    _stream(program, _encode(program, prompt, args.chat or args.skeleton), generating, sampling)


def _stream(program, ids: list[int], generating: options.Generating, sampling) -> None:
    from jaxinfer.cli.timing import Tally
    from jaxinfer.generation import decode_text, stream_steps

    tally = Tally(program)
    if not ids:
        raise InputError("the prompt has no tokens: give at least one character that the tokenizer knows")
    tally.feed([ids], room=generating.max_new_tokens)
    for (piece,) in decode_text(
        tally,
        generating.max_new_tokens,
        sampling=sampling,
        seed=generating.seed,
        stop=generating.stop,
        steps=stream_steps,
    ):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    print(tally.summary(len(ids)), file=sys.stderr)


def _many(args, config, generating: options.Generating, sampling) -> None:
    """Answer every prompt of a file that --out does not have yet."""
    from jaxinfer.eval.data import at, field, read_jsonl

    rows = read_jsonl(args.prompts)
    for line, row in rows:
        with at(args.prompts, line):
            if not field(row, "prompt", str, "a string"):
                raise InputError("'prompt' is empty: give at least one character")
    if not Path(args.out).absolute().parent.is_dir():
        raise InputError(f"{args.out}: its directory does not exist; make it first")

    from tqdm import tqdm

    from jaxinfer.eval.journal import Journal, fingerprint

    program = options.load(config, progress=sys.stderr.isatty())
    prompts = []
    for line, row in rows:
        with at(args.prompts, line):
            prompts.append(_checked(program, _encode(program, row["prompt"], args.chat)))
    run = {
        "prompts": [row for _, row in rows],
        "model": fingerprint(program),
        "options": {**vars(generating), "chat": args.chat},
    }
    with Journal(options.shared(args.out), **run) as journal:
        todo = sorted((i for i in range(len(rows)) if i not in journal.done), key=lambda i: len(prompts[i]))
        with tqdm(total=len(rows), initial=len(rows) - len(todo), unit="prompt") as bar:
            for start in range(0, len(todo), args.batch_size):
                batch = todo[start : start + args.batch_size]
                answers = _answer(program, [prompts[i] for i in batch], batch, args.batch_size, generating, sampling)
                for i, answer in zip(batch, answers, strict=True):
                    row = rows[i][1]
                    named = {"id": row["id"]} if "id" in row else {}
                    journal.append(i, {**named, "prompt": row["prompt"], **answer})
                    bar.update()


def _answer(program, prompts, indices, batch_size: int, generating: options.Generating, sampling) -> list[dict]:
    """Return text, tokens and finish of each prompt; empty rows fill the batch, so that one shape is compiled."""
    from jaxinfer.cli.timing import Tally
    from jaxinfer.generation import decode_text

    empty = batch_size - len(prompts)
    tally = Tally(program, batch_size)
    tally.feed([*prompts, *[[]] * empty], room=generating.max_new_tokens)
    text = [""] * batch_size
    for pieces in decode_text(
        tally,
        generating.max_new_tokens,
        sampling=sampling,
        seed=[generating.seed + i for i in indices] + [0] * empty,
        stop=generating.stop,
        steps=lambda _: _LOOK,
    ):
        text = [t + piece for t, piece in zip(text, pieces, strict=True)]
    return [
        {"text": text[b], "tokens": tally.tokens[b], "finish": "stop" if tally.ended[b] else "length"}
        for b in range(len(prompts))
    ]


def _encode(program, prompt: str, chat: bool) -> list[int]:
    from jaxinfer.generation import tokenizer_of

    tokenizer = tokenizer_of(program)
    if not chat:
        return tokenizer.encode(prompt)
    return tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": prompt}]), add_special=False)


def _checked(program, ids: list[int]) -> list[int]:
    limit = program.config.max_context
    if not 0 < len(ids) < limit:
        raise InputError(f"'prompt' is {len(ids)} tokens: must be 1..{limit - 1}, the model's context is {limit}")
    return ids
