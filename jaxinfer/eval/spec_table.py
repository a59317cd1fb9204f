"""What `jaxinfer spec-bench` shows: a table of drafters by category, and the same as a picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.eval.spec_bench import Answer, summary

_COLUMNS = (
    ("questions", "n", "{:d}"),
    ("tokens_per_step", "tokens/step", "{:.2f}"),
    ("checked_share", "steps with a draft %", "{:.0%}"),
    ("draft_share", "draft %", "{:.1%}"),
    ("check_cost", "widest check", "{:.2f}x"),
    ("speedup", "speed-up", "{:.2f}x"),
    ("range", "p10-p90", "{}"),
    ("predicted", "predicted", "{:.2f}x"),
    ("whole", "with prefill", "{:.2f}x"),
    ("equal", "same answer", "{}"),
)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")


def table(records: Sequence[Mapping[str, Any]], drafters: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each drafter and category, and one for each drafter and all of them."""
    rows = []
    categories = [*dict.fromkeys(r["category"] for r in records), "all"]
    for drafter in drafters:
        for category in categories:
            own = [r for r in records if category in (r["category"], "all")]
            answers, plain = ([Answer(**r["answers"][name]) for r in own] for name in (drafter, ""))
            found = summary(answers, plain)
            most = max(r["gap"][drafter] for r in own)
            equal = f"{found['same']}/{len(own)}" + ("" if most == 0 else f", gap {most:.1e}")
            if any(r.get("synthetic") for r in own):  # whose verdicts were drawn
                equal = "-"
            span = f"{found['speedup_p10']:.2f}-{found['speedup_p90']:.2f}"
            rows.append({"drafter": drafter, "category": category, "range": span, "equal": equal, **found})
    return rows


def markdown(records: Sequence[Mapping[str, Any]], drafters: Sequence[str]) -> str:
    """Return the table. `gap`: by how much two tokens' scores differ, at most, where an answer goes another way."""
    names = ("drafter", "category", *(name for _, name, _ in _COLUMNS))
    lines = ["| " + " | ".join(names) + " |", "|---|---|" + "---:|" * len(_COLUMNS)]
    for row in table(records, drafters):
        cells = [row["drafter"], row["category"], *(form.format(row[key]) for key, _, form in _COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(records: Sequence[Mapping[str, Any]], drafters: Sequence[str], path: str | Path) -> None:
    """Draw the speed-ups by category as bars, and what their parts predict as marks, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = table(records, drafters)
    categories = list(dict.fromkeys(row["category"] for row in rows))
    figure = Figure(figsize=(max(8, 1.3 * len(categories) + 0.4 * len(rows)), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width = 0.8 / len(drafters)
    for i, drafter in enumerate(drafters):
        own = [row for row in rows if row["drafter"] == drafter]
        at = [j + (i - (len(drafters) - 1) / 2) * width for j in range(len(own))]
        speed = [row["speedup"] for row in own]
        low = [max(0, s - row["speedup_p10"]) for s, row in zip(speed, own, strict=True)]
        high = [max(0, row["speedup_p90"] - s) for s, row in zip(speed, own, strict=True)]
        colour = _COLOURS[i % len(_COLOURS)]
        axes.bar(at, speed, 0.9 * width, color=colour, label=drafter, yerr=[low, high], ecolor="#555555", capsize=2)
        marks = [row["predicted"] for row in own]
        axes.plot(at, marks, "_", color="black", markersize=max(6, 120 * width / len(categories)))
    axes.plot([], [], "_", color="black", label="predicted by tokens a step and costs")
    axes.axhline(1, color="#8C8C8C", linewidth=1)
    axes.set_xticks(range(len(categories)), [name.replace("_", " ") for name in categories])
    axes.set_ylabel("decode speed over plain decoding (p10 to p90 of questions)")
    axes.set_ylim(0, 1.1 * math.ceil(max(max(row["speedup_p90"], row["predicted"]) for row in rows)))
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)
