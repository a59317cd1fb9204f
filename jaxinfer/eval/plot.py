"""A comparison as a picture: quality against decode speed and against bytes, with the Pareto front drawn."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from jaxinfer.errors import InputError
from jaxinfer.eval.results import Row
from jaxinfer.eval.table import heading

NAME = "pareto.png"
# What a vertical axis may show, best first: its name, the key, whether more is better.
_QUALITIES = (
    ("perplexity", "perplexity", False),
    ("LAMBADA accuracy", "lambada_acc", True),
    ("HellaSwag accuracy (by length)", "hellaswag_acc_norm", True),
)
_LOG_FROM = 3.0  # weights that differ by more than this are drawn in logarithms
_CUT = 1.6  # perplexities above this times the baseline's are drawn at the edge, or they would squeeze all others
_FRONT, _OTHER, _BASELINE = "#0072B2", "#8C8C8C", "#D55E00"


def pareto_front(points: Sequence[tuple[float | int, float | int]], more_is_better: tuple[bool, bool]) -> list[int]:
    """Return the indices of the points that none beats, from the smallest first coordinate to the largest.

    A point is beaten by one that is at least as good in both coordinates and better in one; equal points stay.
    """
    signs = [1 if more else -1 for more in more_is_better]
    gains = [tuple(s * v for s, v in zip(signs, point, strict=True)) for point in points]

    def beaten(a: tuple) -> bool:
        return any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in gains)

    return sorted((i for i, gain in enumerate(gains) if not beaten(gain)), key=lambda i: points[i])


def plot(rows: Sequence[Row], path: str | Path) -> list[str]:
    """Draw the rows of a comparison, the baseline's first, as a PNG file; return the names of the points in it.

    Raises:
        InputError: no row has a quality to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    label, key, more, shown = _shown(rows)
    failed = [f"{row['variant']}: {row['error']}" for row in rows if row["status"] != "ok"]
    notes = [line for text in failed for line in textwrap.wrap("not shown, failed: " + text, 150)]
    below = 0.16 * len(notes) + 0.1
    figure = Figure(figsize=(13, 6.2 + below), layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(rect=(0, below / (6.2 + below), 1, 1 - below / (6.2 + below)))
    axes = figure.subplots(1, 2, sharey=True)
    quality = [row["quality"][key]["value"] for row in shown]
    cut = math.inf if more else _CUT * quality[0]
    names = [row["variant"] + (f" ({label} {q:.4g})" if q > cut else "") for row, q in zip(shown, quality, strict=True)]
    # Ratios, not tokens/s: rows are measured at different times, each in turns with the baseline.
    speed = shown[0]["speed"]["decode"]["median"]
    panels = (
        (
            f"decode speed, times the baseline's {speed:.4g} tokens/s (right is better)",
            [row["speed"]["decode"]["ratio"] for row in shown],
            True,
        ),
        ("weights, MB (left is better)", [row["size"]["weight_bytes"] / 1e6 for row in shown], False),
    )
    for ax, (xlabel, x, more_x) in zip(axes, panels, strict=True):
        front = pareto_front(list(zip(x, quality, strict=True)), (more_x, more))
        _draw(ax, x, quality, front, cut)
        if max(x) / min(x) > _LOG_FROM:
            ax.set_xscale("log")
            for axis_format in (ax.xaxis.set_major_formatter, ax.xaxis.set_minor_formatter):
                axis_format(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 1)))
        ax.margins(0.12)
        ax.set_xlabel(xlabel)
        ax.grid(True, which="both", color="#E6E6E6", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].set_ylabel(f"{label} ({'up' if more else 'down'} is better)")
    figure.suptitle("\n".join(textwrap.wrap(heading(rows), 170)), fontsize=9)
    axes[1].legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=4, frameon=False, fontsize=9)
    axes[0].set_title(" ", fontsize=9)
    if notes:
        figure.text(0.01, 0.08 / (6.2 + below), "\n".join(notes), fontsize=8, va="bottom", color="#B00000")
    figure.draw_without_rendering()  # the layout, so that places on the axes are places on the picture
    for ax, (_, x, _) in zip(axes, panels, strict=True):
        _label(ax, [(a, min(b, cut)) for a, b in zip(x, quality, strict=True)], names)
    figure.savefig(path, dpi=130)
    return [row["variant"] for row in shown]


def _shown(rows: Sequence[Row]) -> tuple[str, str, bool, list[Row]]:
    """Return the quality that most rows have, and the rows that have it."""
    measured = [row for row in rows if row["status"] == "ok"]
    for label, key, more in _QUALITIES:
        shown = [row for row in measured if row["quality"].get(key, {}).get("value") is not None]
        if shown:
            return label, key, more, shown
    raise InputError("nothing to draw: no variant has a finite quality")


def _draw(ax, x: Sequence[float], y: Sequence[float], front: Sequence[int], cut: float) -> None:
    shown = [i for i in front if y[i] <= cut]
    ax.plot([x[i] for i in shown], [y[i] for i in shown], "-", color=_FRONT, linewidth=1.4, zorder=2)
    filled = {"s": 46, "color": _FRONT, "zorder": 3}
    hollow = {"s": 38, "facecolors": "white", "edgecolors": _OTHER, "linewidths": 1.4, "zorder": 3}
    groups = (
        ("Pareto front", "o", filled, [i for i in shown if i]),
        ("beaten by another", "o", hollow, [i for i in range(1, len(x)) if i not in front and y[i] <= cut]),
        ("off the scale", "^", hollow, [i for i in range(len(x)) if y[i] > cut]),
        ("baseline", "*", {"s": 110, "color": _BASELINE, "zorder": 4}, [0]),
    )
    for label, marker, style, places in groups:
        if places:
            ax.scatter([x[i] for i in places], [min(y[i], cut) for i in places], marker=marker, label=label, **style)


def _label(ax, points: Sequence[tuple[float, float]], names: Sequence[str]) -> None:
    """Write each name near its point, where it covers no other name and no point, with a line to it if it is far."""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox

    scale = ax.figure.dpi / 72
    places = ax.transData.transform(points)
    taken = [Bbox.from_bounds(px - 5 * scale, py - 5 * scale, 10 * scale, 10 * scale) for px, py in places]
    inside = ax.get_window_extent()
    renderer = ax.figure.canvas.get_renderer()
    for (px, py), point, name in zip(places, points, names, strict=True):
        text = ax.annotate(name, point, xytext=(0, 0), textcoords="offset points", fontsize=9, zorder=5)
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
        size = text.get_window_extent(renderer)
        width, height = size.width / scale, size.height / scale
        best = None
        for dx, dy in _offsets(width, height):
            box = Bbox.from_bounds(px + dx * scale, py + dy * scale, size.width, size.height)
            cost = sum(box.overlaps(other) for other in taken) + 3 * (not _within(box, inside))
            if best is None or cost < best[0]:
                best = (cost, dx, dy, box)
            if not cost:
                break
        _, dx, dy, box = best
        text.set_position((dx, dy))
        taken.append(box)
        if abs(dy) > 2 * height or dx > 14 or dx < -width - 14:
            near = (min(max(0, dx), dx + width), dy if dy > 0 else dy + height)
            line = {"arrowstyle": "-", "color": _OTHER, "linewidth": 0.6, "shrinkB": 4}
            ax.annotate("", point, xytext=near, textcoords="offset points", arrowprops=line)


def _offsets(width: float, height: float):
    """Yield where the lower left corner of a name may go, in typographic points from its point: near ones first."""
    for ring in range(12):
        gap = 6 + ring * 9
        yield from ((gap, -height / 2), (-width - gap, -height / 2))
        yield from ((-width / 2, gap), (-width / 2, -height - gap))
        yield from ((gap, gap), (gap, -height - gap), (-width - gap, gap), (-width - gap, -height - gap))


def _within(box, outer) -> bool:
    return bool(box.x0 >= outer.x0 and box.x1 <= outer.x1 and box.y0 >= outer.y0 and box.y1 <= outer.y1)
