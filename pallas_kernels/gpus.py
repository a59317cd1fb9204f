"""What a kernel has to know of a GPU. The kernels are for Hopper: its matrix units, copies and barriers."""

import dataclasses

import jax

from pallas_kernels.assumption import Assumption


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. Its rates are none of a kernel's business: `scripts/bench_kernels.py --gpu` measures them."""

    name: str
    processors: int  # multiprocessors
    shared: int  # bytes of shared memory that one block may have


GPUS = {
    "h100": Gpu("h100", 132, 232_448),
    "h200": Gpu("h200", 132, 232_448),
}
assume = Assumption("gpu", GPUS)


def of_kind(device_kind: str) -> Gpu | None:
    """Return the GPU that JAX calls `device_kind`, such as "NVIDIA H100 80GB HBM3"; None for one of another kind."""
    words = device_kind.lower().split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def target() -> Gpu | None:
    """Return the GPU that is being traced for, or None: the one assumed, the mesh's, or the default backend's."""
    if assume.value is not None:
        return assume.value
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return of_kind(device.device_kind)
    return of_kind(jax.devices()[0].device_kind) if jax.default_backend() == "gpu" else None


def current() -> Gpu:
    """Return the GPU that is being traced for; an H100 where it is none, as for an interpreter."""
    return target() or GPUS["h100"]
