"""What leaving early saves, as a picture: where tokens leave, and how much of it a batch gets."""

from collections.abc import Sequence
from pathlib import Path

from jaxinfer.eval.exits import Exits

NAME = "exits.png"
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"


def table(found: Sequence[Exits]) -> str:
    """Return a row a batch size, as text."""
    layers = found[0].layers
    head = f"{'batch':>5s} {'layers needed':>14s} {'layers run':>11s} {'FLOPs':>6s} {'x full':>14s} {'ms a step':>10s}"
    lines = [head + f" {'same token':>11s}   (of {layers} layers)"]
    for e in found:
        r = e.seconds
        spread = f"{r.ratio:.2f} ({r.ratio_p10:.2f}-{r.ratio_p90:.2f})"
        line = f"{e.batch:5d} {e.depth:14.2f} {e.ran:11.2f} {e.flops:5.0%} {spread:>15s} {1e3 * r.median:10.2f}"
        lines.append(line + f" {e.same:11.1%}")
    return "\n".join(lines)


def plot(found: Sequence[Exits], path: str | Path, title: str) -> None:
    """Draw where tokens leave, and over the batch size: layers run, FLOPs and time as shares of the full model's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    last = found[-1]
    share = [100 * n / sum(last.histogram) for n in last.histogram]
    left.bar(range(len(share)), share, color=_BLUE)
    left.set_xlabel(f"layers that a token needed (of {last.layers})")
    left.set_ylabel("% of tokens")
    batches = range(len(found))
    series = (
        ("layers that tokens needed", [100 * e.depth / e.layers for e in found], "o--", _GREY),
        ("layers that ran", [100 * e.ran / e.layers for e in found], "o-", _BLUE),
        ("FLOPs", [100 * e.flops for e in found], "s-", "#009E73"),
        ("time", [100 / e.seconds.ratio for e in found], "D-", _ORANGE),
    )
    for label, values, style, color in series:
        right.plot(batches, values, style, color=color, label=label)
    right.axhline(100, color=_GREY, linewidth=0.8)
    right.set_xticks(list(batches), [str(e.batch) for e in found])
    right.set_xlabel("batch size")
    right.set_ylabel("% of the full model's")
    right.set_ylim(bottom=0)
    right.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
