"""Reading evaluation data and prompts: text and JSON lines, plain or compressed, with the line of every mistake."""

import contextlib
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxinfer.errors import InputError

_OPEN = {".gz": gzip.open, ".xz": lzma.open}


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file, which may be compressed (.gz, .xz).

    Raises:
        InputError: no such file, an empty one, JSON lines, a damaged archive, or bytes that are not UTF-8.
    """
    path = Path(path)
    if ".jsonl" in path.suffixes:
        raise InputError(f"{path}: JSON lines, where plain text (.txt, .tokens) is expected; give another file")
    return _decoded(path)


def read_jsonl(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """Return the rows of a file of JSON objects, one a line, each with its line number. Blank lines are skipped.

    Raises:
        InputError: no such file, no rows, or a line that is not a JSON object.
    """
    rows = []
    for number, line in enumerate(_decoded(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        with at(path, number):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as e:
                raise InputError(f"not JSON ({e}); each line must be one JSON object") from None
            if not isinstance(row, dict):
                raise InputError(f"a JSON {type(row).__name__}; each line must be one JSON object")
        rows.append((number, row))
    return rows


def field(row: dict[str, Any], key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """Return `row[key]`, which must be of a type in `kind`; `what` says in the error what it should be."""
    if key not in row:
        keys = ", ".join(map(repr, row)) or "none"
        raise InputError(f"has no key {key!r}, its keys are {keys}; {key!r} must be {what}")
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise InputError(f"{key!r} is {str(row[key])[:40]!r}: must be {what}")
    return row[key]


@contextlib.contextmanager
def at(path: str | Path, line: int) -> Iterator[None]:
    """Put the file and the line before the message of an InputError raised inside."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{path}, line {line}: {e}") from None


def _decoded(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"{path}: {'is a directory' if path.is_dir() else 'no such file'}; give the path of a file")
    try:
        with _OPEN.get(path.suffix, open)(path, "rb") as f:
            data = f.read()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as e:
        raise InputError(f"{path}: damaged {path.suffix} archive ({e}); download it again") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise InputError(f"{path}, line {line}: byte 0x{data[e.start]:02x} is not UTF-8; convert the file") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; give a file with something in it")
    return text
