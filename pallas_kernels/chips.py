"""What a kernel has to know of a TPU: how fast it computes and reads, and how much VMEM it has."""

import dataclasses

import jax

from pallas_kernels.assumption import Assumption


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation. Peak rates are the vendor's; the clock follows from them (see KINDS)."""

    name: str
    clock: float  # Hz
    flops_per_cycle: int  # bfloat16, multiply and add counted as two
    int8_ratio: float  # int8 products per bfloat16 product; 1 where the MXU has none of its own
    bandwidth: float  # bytes of HBM a second
    vmem: int  # bytes of VMEM in a core
    cores: int  # cores that share a device: a "parallel" grid axis is split over them
    topology: str  # a small one to compile for

    @property
    def vmem_limit(self) -> int:
        """Bytes of VMEM that a kernel asks for at most; the compiler needs some itself."""
        return self.vmem * 3 // 4


CHIPS = {
    "v5e": Chip("v5e", 1.50e9, 131_072, 2.0, 819e9, 128 << 20, 1, "v5e:2x2"),
    "v5p": Chip("v5p", 1.75e9, 262_144, 2.0, 2765e9, 64 << 20, 2, "v5p:2x2x1"),
    "v6e": Chip("v6e", 1.75e9, 524_288, 2.0, 1640e9, 128 << 20, 1, "v6e:2x2"),
    "tpu7x": Chip("tpu7x", 2.20e9, 524_288, 1.0, 3690e9, 64 << 20, 1, "tpu7x:2x2x1"),
}
_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
_KINDS |= {"TPU v6e": "v6e", "TPU7x": "tpu7x", "TPU v7x": "tpu7x", "TPU v7": "tpu7x"}
assume = Assumption("chip", CHIPS)


def of_kind(device_kind: str) -> Chip:
    """Return the chip that JAX calls `device_kind`.

    Raises:
        NotImplementedError: the kernels do not know it.
    """
    if device_kind not in _KINDS:
        raise NotImplementedError(f"device kind {device_kind!r}: the TPU kernels know {', '.join(sorted(_KINDS))}")
    return CHIPS[_KINDS[device_kind]]


def target() -> Chip | None:
    """Return the chip that is being traced for, or None: the one assumed, the mesh's, or the default backend's.

    A program that is compiled ahead of time names its chip by a mesh of its devices or by `assume`.
    """
    if assume.value is not None:
        return assume.value
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return of_kind(device.device_kind) if device.device_kind in _KINDS else None
    return of_kind(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None


def current() -> Chip:
    """Return the chip that is being traced for; a v5e where it is none, as for an interpreter."""
    return target() or CHIPS["v5e"]
