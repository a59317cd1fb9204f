"""Plans of many settings: rows on disk as they are done, and none is done twice."""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxinfer.errors import InputError
from jaxinfer.eval.journal import Journal
from jaxinfer.plan.alternatives import alternatives
from jaxinfer.plan.planning import plan
from jaxinfer.plan.report import to_json
from jaxinfer.plan.request import Request
from jaxinfer.plan.speculation import parse_decoder

NAME = "plans.jsonl"
Row = dict[str, Any]


def run(
    requests: Sequence[Request],
    directory: str | Path,
    compiling: bool = True,
    wrap: Callable[[Iterable[Request]], Iterable[Request]] = iter,
) -> list[Row]:
    """Return a row for each request: its plan as JSON types, or {"error": why there is none}.

    Rows are written to `directory`/plans.jsonl as they are done, by what was asked: a killed run goes on, and a longer
    sweep into the same directory only plans what is new. `wrap` is given the requests that are left (a progress bar).

    Raises:
        InputError: the file was written with other versions of the compilers, or something else is in it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    keys = [_key(request, compiling) for request in requests]
    with Journal(Path(directory) / NAME, versions=versions()) as journal:
        left = [r for r, key in zip(requests, keys, strict=True) if key not in journal.done]
        for request in wrap(left):
            plain = json.loads(json.dumps(row(request, compiling)))  # as a later run reads it
            journal.append(_key(request, compiling), plain)
        return [journal.done[key] for key in keys]


def rows_of(directory: str | Path) -> list[Row]:
    """Return the rows that a directory has."""
    with Journal(Path(directory) / NAME, versions=versions()) as journal:
        return list(journal.done.values())


def row(request: Request, compiling: bool = True) -> Row:
    """Return the plan of a request as JSON types; of a setting that can't be, the reason."""
    asked = dataclasses.asdict(request)
    try:
        found = plan(request, compiling=compiling)
        nearby = [] if found.memory.fits else alternatives(found)
        return {"request": asked, **to_json(found, nearby, parse_decoder(request.decoder))}
    except InputError as error:
        return {"request": asked, "error": str(error)}


def versions() -> dict[str, str]:
    """Return the versions of what a plan depends on."""
    found = {"jax": jax.__version__}
    try:
        found["libtpu"] = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        found["libtpu"] = ""
    return found


def dollars_per_million(row: Mapping[str, Any], prices: Mapping[str, float | int]) -> float | int | None:
    """Return the dollars of a million decoded tokens, by the price of a chip and hour; chip-hours without prices."""
    rate = row.get("tokens_per_second_per_chip")
    if not rate:
        return None
    price = prices.get(row["topology"].partition(":")[0]) if prices else 1.0
    return None if price is None else price / 3600 / rate * 1e6


def why_not(row: Mapping[str, Any]) -> str | None:
    """Return why a row has no prediction that could run, or None where it has one."""
    if "error" in row:
        return row["error"]
    errors = [p["error"] for p in row["phases"].values() if p["error"]]
    if errors:
        return errors[0]
    free = row["memory"]["free"]
    return None if free is None or free >= 0 else f"does not fit, by {-free / 1e9:.2f} GB"


def _key(request: Request, compiling: bool) -> int:
    text = json.dumps([dataclasses.asdict(request), compiling], sort_keys=True)
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
