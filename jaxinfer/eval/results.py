"""The file that a comparison leaves: one JSON line a variant, whole after a kill, continued by the next run."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxinfer.errors import InputError

Row = dict[str, Any]
NAME = "results.jsonl"
BASELINE = "baseline"
TASKS = ("perplexity", "lambada", "hellaswag")
_BEGIN = b'{"variant": "'


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name for the table, and the passes (as `apply` takes them in text) that make it from the baseline."""

    name: str
    passes: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the numbers depend on besides model and data; a comparison is only continued with the same ones."""

    window: int = 512  # tokens of text that are predicted together
    max_tokens: int | None = None  # of the text, from its beginning
    limit: int | None = None  # rows of each task
    batch_size: int = 8  # windows or questions at a time
    prompt_tokens: int = 512  # of the timed prompt
    decode_tokens: int = 64  # new tokens after it
    rounds: int = 5  # timed, after one that compiles
    seed: int = 0  # draws the timed prompt where there is no text to take it from


class Results:
    """Rows by the name of their variant, on disk as they come.

    Raises:
        InputError: the file has rows that were measured with other settings, or lines of something else.
    """

    def __init__(self, directory: str | Path, settings: Mapping[str, Any]):
        self.path = Path(directory) / NAME
        self.settings = _finite(json.loads(json.dumps(settings)))
        rows, torn = _read(self.path) if self.path.exists() else ([], False)
        for row in rows:
            self._check(row)
        self.rows = {row["variant"]: row for row in rows}
        if torn:
            self._rewrite()

    def append(self, row: Row) -> Row:
        """Write one row at once, with the settings; return it as a reader of the file sees it.

        A row of the same variant, which failed before, is replaced.
        """
        line = _line({**row, "settings": self.settings})
        row = json.loads(line)
        if row["variant"] in self.rows:
            self.rows[row["variant"]] = row
            self._rewrite()
        else:
            self.rows[row["variant"]] = row
            with self.path.open("ab") as f:
                f.write(line)
                f.flush()
                os.fsync(f.fileno())
        return row

    def _rewrite(self) -> None:
        """Write all rows anew; the file is replaced in one step."""
        scratch = self.path.with_suffix(".unfinished")
        scratch.write_bytes(b"".join(map(_line, self.rows.values())))
        os.replace(scratch, self.path)

    def _check(self, row: Row) -> None:
        theirs, ours = row["settings"], self.settings
        changed = sorted(key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key))
        if changed:
            key = changed[0]
            others = f" (and other {', '.join(changed[1:])})" if changed[1:] else ""
            then, now = (_short(x.get(key)) for x in (theirs, ours))
            raise InputError(
                f"{self.path}: measured with {key} {then}, now it is {now}{others}; give another --out, or remove the "
                "file to start over"
            )


def read_results(directory: str | Path) -> list[Row]:
    """Return the rows that a comparison has left in its directory, failed ones too.

    Raises:
        InputError: there is no such file, or it has no rows, or lines of something else.
    """
    path = Path(directory) / NAME
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the --out of a comparison that has run")
    rows, _ = _read(path)
    if not rows:
        raise InputError(f"{path}: has no rows yet; run the comparison first")
    return rows


def _read(path: Path) -> tuple[list[Row], bool]:
    """Return the rows, and whether a last one was cut short."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    torn = data[whole:]
    rows = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            row["variant"], row["status"], row["settings"].items()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            _refuse(path, number)
        rows.append(row)
    if torn and not (torn.startswith(_BEGIN) or _BEGIN.startswith(torn)):
        _refuse(path, len(rows) + 1)
    return rows, bool(torn)


def _refuse(path: Path, number: int) -> None:
    raise InputError(f"{path}, line {number}: not a row of a comparison, so the file is left alone; give another --out")


def _line(row: Row) -> bytes:
    return json.dumps(_finite(row), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _finite(value: Any) -> Any:
    """Return `value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
