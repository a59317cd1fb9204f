"""What a kernel has to know of a GPU. The kernels are for Hopper: its matrix units, copies and barriers."""

import dataclasses

import jax

from pallas_kernels import compat


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU. Rates are the vendor's; `scripts/bench_kernels.py --gpu` measures what can be had of them."""

    name: str
    processors: int  # multiprocessors
    shared: int  # bytes of shared memory that one block may have
    bandwidth: float  # bytes of HBM a second
    flops: float  # of dense bfloat16 a second


GPUS = {
    "h100": Gpu("h100", 132, 232_448, 3350e9, 989e12),
    "h200": Gpu("h200", 132, 232_448, 4800e9, 989e12),
}


def of_kind(device_kind: str) -> Gpu | None:
    """Return the GPU that JAX calls `device_kind`, such as "NVIDIA H100 80GB HBM3"; None for one of another kind."""
    words = device_kind.lower().split()
    return next((gpu for name, gpu in GPUS.items() if name in words), None)


def target() -> Gpu | None:
    """Return the GPU that is being traced for, or None: the one assumed, the mesh's, or the default backend's."""
    if compat.assumed_gpu.value is not None:
        return GPUS[compat.assumed_gpu.value]
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return of_kind(device.device_kind)
    return of_kind(jax.devices()[0].device_kind) if jax.default_backend() == "gpu" else None


def current() -> Gpu:
    """Return the GPU that is being traced for; an H100 where it is none, as for an interpreter."""
    return target() or GPUS["h100"]


class assume:
    """Trace for a GPU by name, whatever the devices are: `with assume("h100"): jax.jit(f).lower(...)`."""

    def __init__(self, name: str):
        if name not in GPUS:
            raise ValueError(f"gpu={name!r}: must be one of {', '.join(GPUS)}")
        self._name = name

    def __enter__(self) -> Gpu:
        self._context = compat.assumed_gpu(self._name)
        self._context.__enter__()
        return GPUS[self._name]

    def __exit__(self, *exc) -> None:
        self._context.__exit__(*exc)
