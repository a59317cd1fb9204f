"""How long collectives take on a torus: bytes over the links that a group has, and hops to its farthest member.

The model of "How to Scale Your Model" (Austin et al., jax-ml.github.io/scaling-book, parts 2 and 3), for groups that
are blocks of a torus: rings send both ways, lines that do not close have half of that, and the dimensions that a group
spans carry shares of the bytes at once.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxinfer.plan.hardware import HOP, Hardware

_ON_CHIP = 6.0  # times a link's rate, between the two devices of a chip (cloud.google.com/tpu/docs/tpu7x)


def collective_seconds(
    kind: str,
    size: float | int,
    places: Int[np.ndarray, "n dims"],
    shape: Sequence[int],
    hardware: Hardware,
) -> float | int:
    """Return the seconds of one collective of `size` bytes among devices at `places` of a torus of this shape.

    `size` is that of the whole array: what an all-gather gives, what an all-reduce reduces, what each device holds
    before an all-to-all. `places` are coordinates and, last, the core of the chip.
    """
    n = len(places)
    if n < 2:
        return 0.0
    share = size * (n - 1) / n
    if hardware.dims == 0:
        return {"all-reduce": 2.0}.get(kind, 1.0) * share / hardware.link + HOP
    spans = [_span(places[:, d], shape[d], hardware) for d in range(len(shape))]
    spans = [s for s in spans if s is not None]
    cores = len(set(places[:, -1].tolist()))
    # Where a group has one device of each chip, the other device's group sends over the same links.
    link = hardware.link * cores / hardware.cores
    if not spans:
        return {"all-reduce": 2.0}.get(kind, 1.0) * share / (_ON_CHIP * hardware.link) + HOP
    hops = sum(s.hops for s in spans)
    if kind == "collective-permute":
        return size / link + HOP * max(s.stride for s in spans)
    if kind in ("all-to-all", "ragged-all-to-all"):
        # Half of what a line's half holds crosses its middle; a ring has two middles, and n / 2 on the way at most.
        return max(size * s.extent / (8 if s.ring else 4) * s.stride / link for s in spans) + HOP * hops
    rate = sum(link * (2 if s.ring else 1) / s.stride for s in spans)
    return (2.0 if kind == "all-reduce" else 1.0) * (share / rate + HOP * hops)


class _Span:
    """How a group lies along one dimension: how many chips, how far apart, and whether their line closes."""

    def __init__(self, extent: int, stride: int, ring: bool):
        self.extent, self.stride, self.ring = extent, stride, ring
        self.hops = stride * (math.ceil(extent / 2) if ring else extent - 1)


def _span(at: Int[np.ndarray, "n"], length: int, hardware: Hardware) -> _Span | None:
    values = sorted(set(at.tolist()))
    if len(values) < 2:
        return None
    stride = max(1, (values[-1] - values[0]) // (len(values) - 1))
    ring = len(values) * stride == length and length % hardware.wraps == 0
    return _Span(len(values), stride, ring)
