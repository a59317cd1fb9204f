"""The command line, `jaxinfer COMMAND`. Each command is one file of this package."""

import argparse
import contextlib
import os
import sys
from typing import NoReturn

import jaxinfer
from jaxinfer.cli import (
    apply,
    bench,
    chat,
    compare,
    evaluate,
    exits,
    generate,
    info,
    interrupt,
    passes,
    plan,
    search_skips,
    spec_bench,
)
from jaxinfer.errors import InputError

_LOST = 3  # another of several processes has ended
_INTERRUPTED = 130  # what shells give a command that Ctrl-C ended
_COMMANDS = {
    "generate": generate,
    "chat": chat,
    "eval": evaluate,
    "info": info,
    "passes": passes,
    "apply": apply,
    "compare": compare,
    "bench": bench,
    "spec-bench": spec_bench,
    "plan": plan,
    "exits": exits,
    "search-skips": search_skips,
}
_EPILOG = "jaxinfer COMMAND --help tells a command's options"


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit status: 0, 2 for bad input, 1 for a bug, 130 after Ctrl-C.

    It is 3 where another of several processes has ended.

    Without `argv` the command is this process's own, from its command line.
    """
    if argv is not None:
        return _run(list(argv))
    interrupt.install()
    status = _run(sys.argv[1:])
    if status in (_INTERRUPTED, _LOST):
        # A computation may still be running, and Python's teardown under it crashes, or the end of a process that has
        # ended already is waited for: leave without one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _run(argv: list[str]) -> int:
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
        return _INTERRUPTED
    except Exception as e:
        if interrupt.behind(e):
            print("jaxinfer: interrupted", file=sys.stderr)
            return _INTERRUPTED
        if debug:
            raise
        if said := _lost(e):
            print(f"jaxinfer: error: {said}", file=sys.stderr)
            return _LOST
        print(f"jaxinfer: error: {_line(e)}", file=sys.stderr)
        return 2 if isinstance(e, (InputError, OSError)) else 1


def _lost(error: Exception) -> str | None:
    """Return what to say where another process has ended."""
    processes = sys.modules.get("jaxinfer.sharding.processes")  # whoever has not used it is alone
    return None if processes is None else processes.lost(error)


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
    parser.add_argument("--version", action="version", version=f"jaxinfer {jaxinfer.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, module in _COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, parents=[shared], allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
