"""A file of results, one JSON line each, that an interrupted run leaves whole and the next run continues."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.errors import InputError
from jaxinfer.models.config import config_to_dict
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program


class Journal:
    """Results by index, on disk as they come. Use it as a context manager.

    Every line is `{"run": ..., "index": ..., result}`; `run` is a short hash of each thing that the results depend on,
    so a file made with another model, other data or other options is refused, not mixed. A last line that was cut
    short by a kill is dropped, and its result computed again.
    """

    def __init__(self, path: str | Path, **run: Any):
        self.path = Path(path)
        self.run = " ".join(f"{name}={_hash(value)}" for name, value in run.items())
        self.done: dict[int, dict[str, Any]] = {}
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            self._take(number, line)
        torn, begin = data[whole:], b'{"run": "'
        if torn and not (torn.startswith(begin) or begin.startswith(torn)):
            self._refuse(len(data[:whole].splitlines()) + 1)
        self._file = self.path.open("ab")
        self._file.truncate(whole)

    def append(self, index: int, result: dict[str, Any]) -> None:
        """Write one result, at once."""
        line = json.dumps({"run": self.run, "index": index, **result}, ensure_ascii=False)
        self._file.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        self.done[index] = result

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _take(self, number: int, line: bytes) -> None:
        try:
            result = json.loads(line)
            run, index = result.pop("run"), int(result.pop("index"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._refuse(number)
        if run != self.run:
            theirs, ours = (dict(part.split("=", 1) for part in r.split() if "=" in part) for r in (run, self.run))
            changed = [name for name in ours if theirs.get(name) != ours[name]] or ["something else"]
            raise InputError(
                f"{self.path}, line {number}: made by a run with other {' and other '.join(changed)}; "
                "give another --out, or remove it to start over"
            )
        self.done[index] = result

    def _refuse(self, number: int) -> None:
        raise InputError(
            f"{self.path}, line {number}: not a line that this command wrote, so nothing is added to the file; "
            "give another --out"
        )


def fingerprint(program: Program) -> dict[str, Any]:
    """Return what tells two models apart: architecture, dtype, passes and a hash of the last norm."""
    scale = fetch(program.model.final_norm.scale).astype(np.float32)
    weights = hashlib.sha256(scale.tobytes()).hexdigest()
    return {
        "config": config_to_dict(program.config),
        "dtype": dtype_of(program),
        "weights": weights,
        "passes": program.passes,
    }


def dtype_of(program: Program) -> str:
    """Return the dtype of the largest weight."""
    return str(max(jax.tree.leaves(program.model), key=lambda leaf: leaf.size).dtype)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:8]
