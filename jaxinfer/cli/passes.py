"""List the passes: what each one is, what it costs, and which others it can't follow.

jaxinfer passes
jaxinfer passes int4              # one pass with its options
jaxinfer passes --matrix          # which pass may follow which, as Markdown
"""

import argparse
import dataclasses
import inspect
import json
import sys
from typing import Any

from jaxinfer.errors import InputError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer passes`."""
    parser.add_argument("name", nargs="?", metavar="PASS", help="show this pass and its options")
    parser.add_argument("--matrix", action="store_true", help="print the composition matrix as Markdown")
    parser.add_argument("--json", action="store_true", help="print one JSON line a pass")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    from jaxinfer.passes import PASSES

    if args.name is not None and args.name not in PASSES:
        raise InputError(f"no pass {args.name!r}: {nearest(args.name, PASSES)}")
    if args.matrix:
        print(matrix())
    elif args.json:
        print("\n".join(json.dumps(about(name)) for name in ([args.name] if args.name else PASSES)))
    else:
        print(one(args.name) if args.name else table())


def about(name: str) -> dict[str, Any]:
    """Return what a pass declares, as JSON types."""
    from jaxinfer.passes import PASSES
    from jaxinfer.passes.base import Calibrated, option_fields

    kind = PASSES[name]
    a = kind.about
    return {
        "name": name,
        "family": a.family,
        "trade": (inspect.getdoc(sys.modules[kind.__module__]) or "").splitlines()[0],
        "lossless": a.lossless,
        "calibrated": issubclass(kind, Calibrated),
        "degenerate": a.degenerate,
        "forms": dict(a.forms),
        "not_after": not_after(name),
        "options": {f.name: f.default for f in option_fields(kind)},
        "paper": a.paper,
    }


def not_after(name: str) -> dict[str, str]:
    """Return the passes that this one can't follow, at their defaults, and why."""
    from jaxinfer.passes import PASSES
    from jaxinfer.passes.base import conflict

    after = PASSES[name]()
    found = {before: conflict(before, kind().options(), after) for before, kind in PASSES.items()}
    return {before: reason for before, reason in found.items() if reason}


def table() -> str:
    """Return every pass as a row, by family."""
    from jaxinfer.passes import PASSES

    rows = [about(name) for name in PASSES]
    width = max(len(r["name"]) for r in rows)
    lines = [f"{'pass':{width}s}  {'lossless':8s}  {'text':4s}  {'paper':10s}  exactly the baseline at"]
    for family in dict.fromkeys(r["family"] for r in rows):
        lines.append(f"\n{family}")
        for r in (r for r in rows if r["family"] == family):
            neutral = "-" if r["degenerate"] is None else ",".join(f"{k}={v}" for k, v in r["degenerate"].items())
            text = "yes" if r["calibrated"] else "-"
            lossless = "yes" if r["lossless"] else "-"
            lines.append(f"{r['name']:{width}s}  {lossless:8s}  {text:4s}  {r['paper']:10s}  {neutral}")
            lines.append(f"{'':{width}s}  {r['trade']}")
            reasons: dict[str, list[str]] = {}
            for before, reason in r["not_after"].items():
                reasons.setdefault(reason, []).append(before)
            lines += [f"{'':{width}s}  not after {_some(b)}: {reason}" for reason, b in reasons.items()]
    return "\n".join(lines)


def one(name: str) -> str:
    """Return a pass with its options."""
    from jaxinfer.passes import PASSES
    from jaxinfer.passes.base import option_fields

    kind, row = PASSES[name], about(name)
    source = inspect.getsource
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            for line in source(base).splitlines():
                field, _, comment = line.strip().partition("  # ")
                if comment and ":" in field:
                    comments[field.split(":")[0]] = comment
    lines = [f"{name} ({row['family']}, {row['paper']})", f"  {row['trade']}", f"  {inspect.getdoc(kind)}", ""]
    for f in option_fields(kind):
        lines.append(f"  {f.name}={f.default!r:24}  {comments.get(f.name, '')}".rstrip())
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


def matrix() -> str:
    """Return the composition matrix: row first, column after it; a number is a reason below the table.

    Passes that are refused after the same ones, and before the same ones, share a row and a column.
    """
    from jaxinfer.passes import PASSES

    refused = {after: not_after(after) for after in PASSES}
    kinds: dict[tuple, list[str]] = {}
    for name in PASSES:
        before = tuple(sorted(refused[name].items()))
        after = tuple((other, row[name]) for other, row in refused.items() if name in row)
        kinds.setdefault((before, after), []).append(name)
    groups = list(kinds.values())
    reasons = list(dict.fromkeys(reason for row in refused.values() for reason in row.values()))
    lines = ["| first \\ then | " + " | ".join(", ".join(g) for g in groups) + " |", "|---" * (len(groups) + 1) + "|"]
    for first in groups:
        found = [refused[then[0]].get(first[0]) for then in groups]
        cells = ["+" if reason is None else f"({reasons.index(reason) + 1})" for reason in found]
        lines.append(f"| {', '.join(first)} | " + " | ".join(cells) + " |")
    notes = [f"({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    return "\n".join(
        [*lines, "", "+ runs and keeps every law. Refused, each with its message: " + "; ".join(notes) + "."]
    )
