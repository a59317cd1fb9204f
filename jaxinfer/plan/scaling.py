"""Strategies on ever more chips: the same rows on a growing machine, by shapes and the network's model alone."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxinfer.errors import InputError
from jaxinfer.plan.planning import plan
from jaxinfer.plan.request import Request
from jaxinfer.plan.topology import parse_topology

SLICES = {
    "v5p": ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x32"),
    "tpu7x": ("4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x32"),
    "v5e": ("4x4", "4x8", "8x8", "8x16", "16x16"),
    "v6e": ("4x4", "4x8", "8x8", "8x16", "16x16"),
}
STOPS = 0.5  # of a strategy's best tokens/s and chip: below it, more chips are no longer worth it


@dataclasses.dataclass(frozen=True)
class Point:
    """A strategy on some chips: the time of a step, its share of network, and tokens a second and chip."""

    strategy: str
    chips: int
    slices: int
    mesh: str
    step: float | int | None  # None: why says why not
    network: float | int
    rate: float | int
    why: str = ""


def scale(
    request: Request, kind: str, strategies: Mapping[str, Mapping[str, int]], chips: Sequence[int]
) -> list[Point]:
    """Return each strategy, the sizes of the axes of a copy of the model, on each number of chips.

    What a copy leaves is `data`: each copy has its share of the batch. More chips than a slice has are several slices,
    each with its share; no step sends anything between copies, and so nothing between slices.

    Raises:
        InputError: a number of chips that no slices of this kind have.
    """
    return [_point(request, kind, name, sizes, n) for name, sizes in strategies.items() for n in chips]


def stops(points: Sequence[Point]) -> dict[str, int | None]:
    """Return, for each strategy, the most chips at which it has half of its best tokens/s and chip; None: nowhere."""
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(p.strategy for p in points):
        own = [p for p in points if p.strategy == name and p.step is not None]
        best = max((p.rate for p in own), default=0)
        found[name] = max((p.chips for p in own if p.rate >= STOPS * best), default=None)
    return found


def _point(request: Request, kind: str, name: str, sizes: Mapping[str, int], chips: int) -> Point:
    topologies = [parse_topology(f"{kind}:{shape}") for shape in SLICES[kind]]
    slice_ = next((t for t in reversed(topologies) if chips % t.chips == 0 and t.chips <= chips), None)
    if slice_ is None:
        raise InputError(f"{chips} chips: no slices of {kind} have as many; give a multiple of {topologies[0].chips}")
    slices, ways = chips // slice_.chips, 1
    for size in sizes.values():
        ways *= size
    copies = slice_.devices // ways
    mesh = ",".join(f"{axis}={size}" for axis, size in {"data": copies, **sizes}.items())
    blank: dict[str, Any] = dict(strategy=name, chips=chips, slices=slices, mesh=mesh, step=None, network=0, rate=0)
    if not copies or request.batch % (slices * copies):
        what = f"a copy takes {ways} devices" if not copies else f"{slices * copies} copies, and {request.batch} rows"
        return Point(**blank, why=what)
    asked = dataclasses.replace(
        request, topology=slice_.name, mesh=mesh, batch=request.batch // slices, phases=("decode",)
    )
    try:
        found = plan(asked, compiling=False)
    except InputError as error:
        return Point(**blank, why=str(error))
    if not found.memory.fits:
        return Point(**blank, why=f"does not fit, by {-found.memory.free / 1e9:.1f} GB")
    times = found.phases["decode"].times
    rate = request.batch / times.step / chips
    return Point(name, chips, slices, mesh, times.step, times.network / times.step, rate)


def plot(points: Sequence[Point], path: str | Path, title: str) -> None:
    """Draw tokens a second and chip, and the time of a token, against chips, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for name in dict.fromkeys(p.strategy for p in points):
        own = [p for p in points if p.strategy == name and p.step is not None]
        axes[0].plot([p.chips for p in own], [p.rate for p in own], "o-", label=name)
        axes[1].plot([p.chips for p in own], [1e3 * p.step for p in own], "o-", label=name)
    for ax, label in zip(axes, ("tokens/s per chip", "milliseconds a token"), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("chips")
        ax.set_ylabel(f"predicted {label}")
        ax.grid(True, which="both", color="#E6E6E6", linewidth=0.6)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
