"""How long a step takes: bytes over the memory's rate or FLOPs over the products', part by part, and the network."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxinfer.plan.counts import Work
from jaxinfer.plan.hardware import ATTAINED_BANDWIDTH, Hardware
from jaxinfer.plan.hlo import Collective
from jaxinfer.plan.network import collective_seconds


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step's parts, one after another: products wait for attention, and both for the network."""

    memory: float | int  # of the parts that memory limits
    products: float | int  # of the parts that products limit
    network: float | int
    roofline: float | int  # all parts at the vendor's peaks, the network for nothing
    launches: float | int = 0.0  # what a GPU's kernels take beside their bytes and products

    @property
    def step(self) -> float | int:
        """Seconds of the step."""
        return self.memory + self.products + self.network + self.launches

    @property
    def limit(self) -> str:
        """What takes the most of it."""
        parts = {"HBM": self.memory, "products": self.products, "network": self.network, "launches": self.launches}
        return max(parts, key=parts.get)

    def __add__(self, other: "Times") -> "Times":
        return Times(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def predict(work: Work, network: float | int, hardware: Hardware) -> Times:
    """Return the times of a step: `max(bytes / bandwidth, FLOPs / peak)` of the linear maps, the same of attention.

    Both rates are what programs get (`ATTAINED_BANDWIDTH`, `Hardware.products`, `Hardware.attention`), and the roofline
    what the vendor says. Collectives are taken to wait: XLA overlaps few of a step's.
    """
    linear = (
        work.weight_bytes + work.activation_bytes,
        work.product_flops / hardware.flops + work.integer_flops / hardware.int8,
    )
    attention = (work.cache_bytes, work.attention_flops / hardware.flops)
    memory = products = roofline = 0.0
    for (size, seconds), share in ((linear, hardware.products), (attention, hardware.attention)):
        roofline += max(size / hardware.bandwidth, seconds)
        read, compute = size / (hardware.bandwidth * ATTAINED_BANDWIDTH), seconds / share
        if read >= compute:
            memory += read
        else:
            products += compute
    return Times(memory, products, network, roofline)


def network_seconds(
    collectives: Mapping[Collective, float | int], places: np.ndarray, shape: tuple[int, ...], hardware: Hardware
) -> float | int:
    """Return the seconds of a step's collectives, one after another."""
    return sum(
        n * collective_seconds(c.kind, c.bytes, places[list(c.group)], shape, hardware) for c, n in collectives.items()
    )
