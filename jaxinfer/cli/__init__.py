"""The command line: `jaxinfer generate`, `chat`, `eval` and `info`. Each command is one file of this package."""

import argparse
import contextlib
import os
import sys
from typing import NoReturn

from jaxinfer.cli import chat, evaluate, generate, info
from jaxinfer.errors import InputError

_EPILOG = "jaxinfer COMMAND --help tells a command's options"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("jaxinfer")
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            version = "(not installed)"
        print(f"jaxinfer {version}")
        parser.exit()


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for bad input, 1 for a bug, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    debug = "--debug" in argv[: argv.index("--") if "--" in argv else None]
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a character is no reason to stop
    try:
        # Commands import jax inside `run`, so that help and mistakes in the options answer at once.
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except BrokenPipeError:
        # The reader has gone; point stdout away from it so that the interpreter's last flush is quiet too.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("jaxinfer: interrupted", file=sys.stderr)
        return 130
    except Exception as e:
        if debug:
            raise
        print(f"jaxinfer: error: {_line(e)}", file=sys.stderr)
        return 2 if isinstance(e, (InputError, OSError)) else 1


def _line(error: Exception) -> str:
    """Return an error as one line."""
    if isinstance(error, InputError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; run with --debug for the traceback"
    return " ".join(text.splitlines())


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser = _Parser(prog="jaxinfer", epilog=_EPILOG, parents=[shared], allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in (("generate", generate), ("chat", chat), ("eval", evaluate), ("info", info)):
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, parents=[shared], allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
