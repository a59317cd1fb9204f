"""Typed look-up in the JSON files of a Hugging Face checkpoint, with errors that name file, key and value."""

import json
from pathlib import Path
from typing import Any

from jaxinfer.errors import InputError

REQUIRED: Any = object()  # the default of a key that has none
MAX_SIZE = 1 << 31  # of any one dimension: keeps products of sizes far from overflow
MAX_NUMBER = 1e30
MAX_JSON = 1 << 24  # bytes of a config file; real ones have a few thousand


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in the file at `path`; raises InputError where it is none, or is too large for one."""
    try:
        with open(path, "rb") as f:
            raw = f.read(MAX_JSON + 1)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); check the path and its permissions") from e
    if len(raw) > MAX_JSON:
        raise InputError(f"{path}: has more than {MAX_JSON} bytes, too many for a configuration; fetch the file again")
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: is not valid JSON ({e}); fetch the file again") from e
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__}, expected an object; fetch the file again")
    return value


class Keys:
    """Typed look-up in one JSON object of a config; every complaint names the file, the key and the value."""

    def __init__(self, values: dict[str, Any], path: Path):
        self.values, self.path = values, path

    def fail(self, key: str, constraint: str) -> InputError:
        shown = repr(self.values[key]) if key in self.values else "missing"
        return InputError(f"{self.path}: {key} is {shown:.200}, {constraint}; correct the file or fetch it again")

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """Return the value of `key`, or `default` where it is missing or null."""
        value = self.values.get(key)
        if value is None and default is REQUIRED:
            raise self.fail(key, "but this model needs it")
        return default if value is None else value

    def integer(self, key: str, default: Any = REQUIRED, low: int = 1, high: int = MAX_SIZE) -> int | None:
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.fail(key, f"expected an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> float | None:
        """Return a finite number above zero."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MAX_NUMBER:
            raise self.fail(key, "expected a number above zero")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.fail(key, "expected true or false")
        return value

    def object(self, key: str) -> dict[str, Any] | None:
        value = self.get(key, None)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, "expected a JSON object")
        return value
