"""A comparison as a table for a terminal, or in Markdown for a README."""

import itertools
import math
import textwrap
from collections.abc import Callable, Sequence

from jaxinfer.eval.results import Row

_LEGEND = (
    "KV B/t: bytes of KV cache a token; run MB: all that the prompt takes; roof %: of the bandwidth in decode / of the "
    "FLOP/s in prefill; ± standard error of quality, half the 10th to 90th percentile of speed; x: of the baseline's, "
    "speeds in the same round; ! worse than the baseline by more than the noise (2 standard errors, or 9 rounds in 10)"
)
_NAME = 20  # columns of the longest name that is not broken
Cell = Callable[[Row, Row], str]  # of a row, and of the baseline's


def heading(rows: Sequence[Row]) -> str:
    """Return one line: the model, what it was measured on, and where."""
    s = rows[0]["settings"]
    tasks = [_task(name, s) for name in s["data"]]
    versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
    speeds = f"prompt of {s['prompt_tokens']} tokens, {s['decode_tokens']} new, {s['rounds']} rounds"
    return f"{s['model']} ({s['dtype']}) on {s['device']}; {', '.join(tasks)}; {speeds}, batch 1; {versions}"


def terminal(rows: Sequence[Row], width: int = 150) -> str:
    """Return an aligned table. What failed says why on its row, wrapped to `width`."""
    header, body = _cells(rows)
    widths = [max(len(r[i]) for r in [header, *(b for b in body if b)]) for i in range(len(header))]
    widths[0] = min(_NAME, max(len(row["variant"]) for row in rows))

    def line(cells: Sequence[str]) -> str:
        first, *rest = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return " ".join([first, *rest]).rstrip()

    out = [*textwrap.wrap(heading(rows), width), "", line(header), " ".join("-" * w for w in widths)]
    for row, cells in zip(rows, body, strict=True):
        name = textwrap.wrap(row["variant"], _NAME)
        rest = [line(["", *cells[1:]])[widths[0] :]] if cells else textwrap.wrap(_failure(row), width - widths[0] - 1)
        for first, more in itertools.zip_longest(name, rest, fillvalue=""):
            out.append(f"{first.ljust(widths[0])}{'' if cells else ' '}{more}".rstrip())
    return "\n".join([*out, "", *textwrap.wrap(_LEGEND, width)])


def markdown(rows: Sequence[Row]) -> str:
    """Return the same table in Markdown; what failed is listed below it."""
    header, body = _cells(rows)
    out = [heading(rows) + ".", "", _bar(header), _bar(["---", *["---:"] * (len(header) - 1)])]
    out += [_bar([_escape(cells[0]), *cells[1:]]) for cells in body if cells]
    failed = [f"- {_escape(row['variant'])}: {_escape(_failure(row))}" for row in rows if row["status"] != "ok"]
    return "\n".join([*out, *([""] if failed else []), *failed, "", _LEGEND + "."])


def _bar(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


def _failure(row: Row) -> str:
    return f"failed ({row['stage']}): {row['error']}"


def _task(name: str, settings: Row) -> str:
    if name != "perplexity":
        return name + ("" if settings["limit"] is None else f" (first {settings['limit']} rows)")
    tokens = "" if settings["max_tokens"] is None else f", first {settings['max_tokens']:,} tokens"
    return f"perplexity (windows of {settings['window']}{tokens})"


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the header and each row's cells, without columns that no row has; of a failed row no cells."""
    baseline, measured = rows[0], [row for row in rows if row["status"] == "ok"]
    columns = [(name, cell) for name, cell in _COLUMNS if any(cell(row, baseline) for row in measured)]
    body = [[row["variant"], *(cell(row, baseline) for _, cell in columns)] if row in measured else [] for row in rows]
    return ["variant", *(name for name, _ in columns)], body


def _quality(key: str, show: Callable[[float], str]) -> Cell:
    """Return a cell for a measure that `show` turns into text."""

    def cell(row: Row, _: Row) -> str:
        found = row.get("quality", {}).get(key)
        return "" if not found else "inf" if found["value"] is None else show(found["value"])

    return cell


def _rise(row: Row, baseline: Row) -> str:
    """Return by how many percent the perplexity is above the baseline's, with the error of the difference."""
    found = row.get("quality", {}).get("extra_nats")
    if not found or row is baseline:
        return ""
    nats, error = found["value"], found["stderr"]
    if nats is None or nats > 2:
        return ("inf" if nats is None or nats > 20 else f"x{math.exp(nats):.4g}") + "!"
    percent = 100 * math.expm1(nats)
    spread = "" if error is None else f"±{100 * math.exp(nats) * error:.2f}"
    return f"{percent:+.2f}{spread}" + _mark(error is not None and nats > 2 * error)


def _accuracy(key: str) -> Cell:
    def cell(row: Row, baseline: Row) -> str:
        found, base = (r.get("quality", {}).get(key) for r in (row, baseline))
        if not found:
            return ""
        errors = found["stderr"], base["stderr"]
        worse = None not in errors and base["value"] - found["value"] > 2 * math.hypot(*errors)
        spread = "" if found["stderr"] is None else f"±{100 * found['stderr']:.1f}"
        return f"{100 * found['value']:.1f}{spread}" + _mark(worse)

    return cell


def _bytes(key: str, scale: float, digits: int) -> Cell:
    def cell(row: Row, _: Row) -> str:
        value = row["size"][key]
        return "" if value is None else f"{value / scale:.{digits}f}"

    return cell


def _share_of_bytes(key: str) -> Cell:
    def cell(row: Row, baseline: Row) -> str:
        if row is baseline or not baseline["size"][key]:
            return ""
        ratio = row["size"][key] / baseline["size"][key]
        return f"{ratio:.2f}x" + _mark(ratio > 1.005)

    return cell


def _rate(key: str) -> Cell:
    def cell(row: Row, _: Row) -> str:
        r = row["speed"][key]
        value = 1000 * r["median"] if key == "first_token" else r["median"]
        half = 50 * (r["p90"] - r["p10"]) / r["median"]
        return (f"{value:.0f}" if value >= 100 else f"{value:.1f}") + f"±{half:.0f}%"

    return cell


def _ratio(key: str) -> Cell:
    def cell(row: Row, baseline: Row) -> str:
        r = row["speed"][key]
        return "" if row is baseline else f"{r['ratio']:.2f}x" + _mark(r["ratio_p90"] < 1)

    return cell


def _roofline(row: Row, _: Row) -> str:
    return "/".join(f"{100 * row['roofline'][key]:.0f}" for key in ("decode", "prefill"))


def _mark(worse: bool) -> str:
    return "!" if worse else ""


_COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("ppl", _quality("perplexity", lambda x: f"{x:.2f}" if x < 1e4 else f"{x:.2e}")),
    ("ppl +%", _rise),
    ("KL", _quality("kl", lambda x: f"{x:.4f}")),
    ("top-1 %", _quality("top1", lambda x: f"{100 * x:.1f}")),
    ("lambada %", _accuracy("lambada_acc")),
    ("hellaswag %", _accuracy("hellaswag_acc_norm")),
    ("MB", _bytes("weight_bytes", 1e6, 1)),
    ("x", _share_of_bytes("weight_bytes")),
    ("KV B/t", _bytes("kv_bytes_per_token", 1.0, 0)),
    ("x", _share_of_bytes("kv_bytes_per_token")),
    ("run MB", _bytes("run_bytes", 1e6, 0)),
    ("prefill/s", _rate("prefill")),
    ("x", _ratio("prefill")),
    ("decode/s", _rate("decode")),
    ("x", _ratio("decode")),
    ("TTFT ms", _rate("first_token")),
    ("roof %", _roofline),
)
