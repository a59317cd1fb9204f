"""What a plan has to know of a chip, per JAX device: memory, products, and the links to its neighbours."""

import dataclasses

from pallas_kernels.chips import CHIPS

GB = 1e9


# libtpu's compiler gives programs 15.75 of a v5e's 16 GiB; see `test_plan_tpu`. The same share is taken of the others.
USABLE = 15.75 / 16
# What programs get of the peaks: of bandwidth what tokamax's one product that bytes limit got on a v5e, of products
# what XLA's own dense product gets of them by its static estimate (0.95 of a v5e's). `jaxinfer plan` says both times.
ATTAINED_BANDWIDTH = 0.86
ATTAINED_FLOPS = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of chip. Rates are the vendor's peaks for one JAX device, of which a chip has `cores`."""

    name: str
    hbm: float | int  # bytes of memory
    bandwidth: float | int  # bytes of memory a second
    flops: float | int  # of bfloat16 products a second
    int8: float | int  # of int8 products a second; the same where the chip has none of its own
    link: float | int  # bytes/s of one link in one direction
    dims: int  # of the torus: 2 or 3; 0: a switch that joins all
    wraps: int  # a dimension of a multiple of this many chips is a ring; others are lines
    attention: float | int  # share of the products' peak that attention of prompts gets
    products: float | int = ATTAINED_FLOPS  # the share that other large products get
    cores: int = 1
    launch: float | int = 0.0  # seconds that each kernel of a program takes beside its bytes
    source: str = ""

    @property
    def usable(self) -> float | int:
        """Bytes that a program can have: the runtime keeps some."""
        return self.hbm * USABLE


HOP = 1e-6  # seconds from a chip to its neighbour (How to Scale Your Model, "How to Think About TPUs")

_GIB = 2.0**30


def _tpu(
    name: str, hbm: float | int, link: float | int, dims: int, wraps: int, attention: float | int, cores: int = 1
) -> Hardware:
    chip = CHIPS[name]
    flops = chip.clock * chip.flops_per_cycle
    return Hardware(
        name=name, hbm=hbm * _GIB, bandwidth=chip.bandwidth, flops=flops, int8=flops * chip.int8_ratio, link=link,
        dims=dims, wraps=wraps, attention=attention, cores=cores,
        source="cloud.google.com/tpu/docs; links: How to Scale Your Model",
    )  # fmt: skip


# Attention of prompts: of v5e and v6e the static estimates of our kernel (its softmax, not the MXU, is the limit on
# v6e), of tpu7x and H100 what tokamax's splash attention and cuDNN were measured to get; of v5p and v4 as of v5e.
# What a launch takes on an H100 is what a bfloat16 step of Llama-3-8B's shape took there beyond its bytes at the share
# above, over its 432 kernels (`benchmarks/results/step_h100.jsonl`), and its products' share what 8192^3 in bfloat16
# got (`kernels_h100.jsonl`). On a TPU a program is one kernel.
HARDWARE = {
    "v5e": _tpu("v5e", 16, 45e9, 2, 16, 0.70),
    "v5p": _tpu("v5p", 95, 90e9, 3, 4, 0.70),
    "v6e": _tpu("v6e", 32, 90e9, 2, 16, 0.26),
    # 1,200 GB/s a chip in both directions over six links; the 192 GiB and the products of a chip are two devices'.
    "tpu7x": _tpu("tpu7x", 96, 100e9, 3, 4, 0.18, cores=2),
    "v4": Hardware(
        name="v4", hbm=16 * _GIB, bandwidth=0.6e12, flops=137.5e12, int8=137.5e12, link=45e9, dims=3, wraps=4,
        cores=2, attention=0.70, source="cloud.google.com/tpu/docs/v4, halved: libtpu compiles for one core a device",
    ),
    "h100": Hardware(
        name="h100", hbm=80e9, bandwidth=3.35e12, flops=989e12, int8=1979e12, link=450e9, dims=0, wraps=1,
        attention=0.65, products=0.72, launch=1.7e-6, source="NVIDIA's data sheet of the H100 SXM",
    ),
}  # fmt: skip
