"""Talk with a model, in its own chat template; what was said stays in the cache.

Ctrl-C stops an answer; /reset forgets the conversation, /help lists the commands, /quit or the end of input leaves.
Without sampling options or --config, tokens are drawn as the checkpoint recommends, or greedily where it does not say.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator

from jaxinfer.cli import options
from jaxinfer.cli.interrupt import Interrupt
from jaxinfer.errors import InputError

_ANSWER = 512  # new tokens an answer may take unless told
_HELP = "/reset forgets the conversation, /quit leaves; Ctrl-C stops an answer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer chat`."""
    options.add_model(parser)
    options.add_mesh(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    options.add_generating(parser)


class Conversation:
    """Messages, and the session whose cache holds them."""

    def __init__(self, program, system: str | None, generating: options.Generating):
        from jaxinfer.generation import tokenizer_of
        from jaxinfer.session import Session

        self.program, self.generating, self.sampling = program, generating, generating.sampling()
        self.tokenizer = tokenizer_of(program)
        self.beginning = [{"role": "system", "content": system}] if system else []
        self.tokenizer.apply_chat([*self.beginning, {"role": "user", "content": "?"}])  # refused now rather than later
        self.session = Session(program)
        self.computed = 0  # prompt tokens that the last answer computed: those that the cache did not have
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message. The session forgets by itself: it keeps a common prefix."""
        self.messages = list(self.beginning)
        self.turn = 0

    def answer(self, text: str, interrupt: Interrupt) -> Iterator[str]:
        """Yield the answer to `text` in pieces, and remember both; an answer stopped by `interrupt` up to there.

        Raises:
            InputError: the conversation is longer than the context; `text` is then not part of it.
        """
        from jaxinfer.generation import decode_text, stream_steps

        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(self.tokenizer.apply_chat(messages), add_special=False)
        limit = self.program.config.max_context
        if len(ids) >= limit:
            raise InputError(
                f"the conversation is {len(ids)} tokens, the model's context is {limit}; start a new one with /reset"
            )
        self.computed = self.session.feed([ids], room=self.generating.max_new_tokens)
        said = ""
        pieces = decode_text(
            self.session,
            self.generating.max_new_tokens,
            sampling=self.sampling,
            seed=self.generating.seed + self.turn,
            stop=self.generating.stop,
            steps=stream_steps,
        )
        with contextlib.closing(pieces):
            for (piece,) in pieces:
                said += piece
                yield piece
                if interrupt.pressed:
                    break
        self.messages = [*messages, {"role": "assistant", "content": said}]
        self.turn += 1
        if not interrupt.pressed and len(self.session.rows[0]) >= limit - 1:
            _note(f"the model's context of {limit} tokens is full; start a new conversation with /reset")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    config = options.read_config(args)
    options.generating(args, config).sampling()  # a bad flag is refused before the model is loaded
    program = options.load(config, progress=sys.stderr.isatty())
    recommended = {"max_new_tokens": _ANSWER, **program.sampling}
    conversation = Conversation(program, args.system, options.generating(args, config, recommended))
    tty = sys.stdin.isatty()
    if tty:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history
        _note(f"{program.name}: {_HELP}")
    interrupted = False
    while True:
        try:
            text = _read(tty)
        except KeyboardInterrupt:
            if interrupted:
                return
            interrupted = True
            _note("\nCtrl-C again, or /quit, to leave")
            continue
        interrupted = False
        if text is None or text == "/quit":
            return
        if text == "/reset":
            conversation.reset()
            _note("the conversation is forgotten")
        elif text == "/help":
            _note(_HELP)
        elif text.startswith("/") and text[1:].isalpha():
            _note(f"{text}: no such command; {_HELP}")
        elif text:
            _say(conversation, text)


def _say(conversation: Conversation, text: str) -> None:
    """Print the answer as it comes."""
    with Interrupt() as interrupt:
        try:
            for piece in conversation.answer(text, interrupt):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except InputError as e:
            _note(str(e))
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        if interrupt.pressed:
            _note("(stopped)")


def _read(tty: bool) -> str | None:
    """Return the next line that the user says, or None at the end of the input."""
    if tty:
        try:
            return input("> ").strip()
        except EOFError:
            print(file=sys.stderr)
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
