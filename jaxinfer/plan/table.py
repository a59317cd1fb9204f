"""Rows of plans as a table, for a terminal and in Markdown, and as a picture of cost against latency."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.eval.plot import pareto_front
from jaxinfer.plan.sweep import Row, dollars_per_million, why_not

PICTURE = "pareto.png"
_HEADER = ("model", "passes", "topology", "mesh", "batch", "GB", "free", "ms/token", "limit", "tok/s/chip", "cost")
_FRONT, _OTHER = "#0072B2", "#8C8C8C"


def cells(row: Row, prices: Mapping[str, float | int]) -> list[str]:
    """Return a row's cells: what it is, GB that a device needs and has left, time, its limit, throughput and cost."""
    asked = row["request"]
    first = [asked["model"], "+".join(asked["passes"]) or asked["dtype"], asked["topology"], asked["mesh"] or "model"]
    first.append(str(asked["batch"]))
    if "error" in row:
        return [*first, *[""] * 6]
    memory, decode = row["memory"], row["phases"].get("decode")
    free = "" if memory["free"] is None else f"{memory['free'] / 1e9:.2f}"
    out = [*first, f"{memory['total'] / 1e9:.2f}", free]
    if decode is None or decode["times"] is None or why_not(row):
        return [*out, *[""] * 4]
    cost = dollars_per_million(row, prices)
    step, rate = decode["times"]["step"], row["tokens_per_second_per_chip"]
    last = [f"{1e3 * step:.2f}", decode["times"]["limit"], f"{rate:.1f}", "" if cost is None else f"{cost:.3f}"]
    return [*out, *last]


def terminal(rows: Sequence[Row], prices: Mapping[str, float | int]) -> str:
    """Return an aligned table; what can't be says why below its row."""
    header = [*_HEADER[:-1], _cost(prices)]
    body = [cells(row, prices) for row in rows]
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]

    def line(texts: Sequence[str]) -> str:
        pairs = zip(texts, widths, strict=True)
        return "  ".join(t.ljust(w) if i < 4 else t.rjust(w) for i, (t, w) in enumerate(pairs)).rstrip()

    out = [line(header), line(["-" * w for w in widths])]
    for row, texts in zip(rows, body, strict=True):
        out.append(line(texts))
        if reason := why_not(row):
            out.append(f"  {reason}")
    return "\n".join(out)


def plot(rows: Sequence[Row], prices: Mapping[str, float | int], path: str | Path) -> int:
    """Draw cost a million tokens against the time of a token as a PNG file; return how many points: of 0, no file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [(row, dollars_per_million(row, prices)) for row in rows if not why_not(row)]
    shown = [(row, cost) for row, cost in shown if cost is not None]
    if not shown:
        return 0
    points = [(1e3 * row["phases"]["decode"]["times"]["step"], cost) for row, cost in shown]
    front = pareto_front(points, (False, False))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.plot(*zip(*(points[i] for i in front), strict=True), "o-", color=_FRONT, label="Pareto front", zorder=3)
    rest = [p for i, p in enumerate(points) if i not in front]
    if rest:
        ax.scatter(*zip(*rest, strict=True), facecolors="white", edgecolors=_OTHER, label="beaten by another", zorder=2)
    for i in front:
        ax.annotate(_label(shown[i][0]), points[i], xytext=(6, 4), textcoords="offset points", fontsize=8)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("predicted milliseconds a token of a row (left is better)")
    ax.set_ylabel(f"predicted {_cost(prices)} (down is better)")
    ax.grid(True, which="both", color="#E6E6E6", linewidth=0.6)
    ax.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return len(points)


def _cost(prices: Mapping[str, Any]) -> str:
    return "$/Mtok" if prices else "chip-h/Mtok"


def _label(row: Row) -> str:
    asked = row["request"]
    passes = "+".join(asked["passes"]) or asked["dtype"]
    return f"{asked['topology']} {asked['mesh']} batch {asked['batch']} {passes}"
