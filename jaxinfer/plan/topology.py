"""Machines by name: `v5e:16x16`, `h100:8`, `cpu:8`; how many devices, where each is, and what compiles for them."""

import dataclasses
import importlib.util
import math
import os
import re

import numpy as np
from jaxtyping import Int

from jaxinfer.errors import InputError, nearest
from jaxinfer.plan.hardware import HARDWARE, Hardware
from pallas_kernels import aot

_EXAMPLES = {"v5e": "v5e:4x4", "v6e": "v6e:16x16", "v5p": "v5p:4x4x4", "tpu7x": "tpu7x:4x4x4", "v4": "v4:4x4x4"}
_LARGEST = {"v5e": 256, "v6e": 256, "v5p": 8960, "tpu7x": 9216, "v4": 4096}  # chips that links join


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: its kind, and how many chips it has along each dimension."""

    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """What `parse_topology` reads."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def hardware(self) -> Hardware | None:
        """Peaks and links; None of a CPU, whose times are not predicted."""
        return HARDWARE.get(self.kind)

    @property
    def chips(self) -> int:
        """Chips, which is what is paid for."""
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """What JAX calls devices: two a chip on some."""
        return self.chips * (self.hardware.cores if self.hardware else 1)

    @property
    def is_tpu(self) -> bool:
        """Whether libtpu compiles for it."""
        return self.kind in _EXAMPLES

    def coordinates(self) -> Int[np.ndarray, "devices dims"]:
        """Return where each device's chip is in the torus and, last, which core of it the device is.

        In the order in which a mesh takes them where nothing is compiled: its last axes join neighbours.
        """
        cores = self.hardware.cores if self.hardware else 1
        return np.indices((*self.shape, cores)).reshape(len(self.shape) + 1, -1).T


def parse_topology(text: str) -> Topology:
    """Return the machine of a name.

    Raises:
        InputError: an unknown kind, or a shape that it does not come in.
    """
    kind, colon, rest = text.partition(":")
    known = [*_EXAMPLES, "h100", "cpu"]
    if kind not in known:
        raise InputError(f"topology {text!r}: no kind {kind!r}; {nearest(kind, known)}, as in v5e:4x4 or cpu:8")
    example = _EXAMPLES.get(kind, f"{kind}:8")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", rest):
        raise InputError(f"topology {text!r}: write kind:chips along each dimension, as in {example}")
    shape = tuple(int(n) for n in rest.split("x"))
    dims = HARDWARE[kind].dims if kind in _EXAMPLES else 1
    if len(shape) != dims:
        raise InputError(f"topology {text!r}: {kind} has {dims} dimension{'s' * (dims > 1)}, as in {example}")
    if kind in _LARGEST and math.prod(shape) > _LARGEST[kind]:
        raise InputError(
            f"topology {text!r}: {math.prod(shape)} chips, and {kind} slices have {_LARGEST[kind]} at most"
        )
    if kind in ("v5e", "v6e") and max(shape) > 16:
        raise InputError(f"topology {text!r}: {kind} has 16 chips along a dimension at most; 16x16 is the largest")
    even = all(n % 2 == 0 for n in shape[:2])
    if kind in _EXAMPLES and math.prod(shape) > 1 and not even:
        better = "x".join(str(n + n % 2 if i < 2 else n) for i, n in enumerate(shape))
        raise InputError(f"topology {text!r}: hosts hold 2x2 chips, so the first two are even; {kind}:{better} exists")
    if kind == "h100" and shape[0] > 8:
        raise InputError(f"topology {text!r}: only the 8 GPUs that NVLink joins are modelled; give h100:8 or less")
    return Topology(kind, shape)


def environment(topology: Topology) -> dict[str, str]:
    """Return the environment of a process that compiles for a topology, and touches nothing of this one's.

    Raises:
        InputError: the compiler is not installed; how to install it.
    """
    if topology.is_tpu:
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(
                f"topology {topology.name}: needs libtpu, the TPU's compiler; no TPU is needed: "
                'pip install "jaxinfer[plan]", on Linux x86-64'
            )
        return aot.environment()
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if topology.kind == "cpu":
        flag = f"--xla_force_host_platform_device_count={topology.devices}"
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    elif not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
        raise InputError(
            f"topology {topology.name}: needs JAX's CUDA plugin, the GPU's compiler; no GPU is needed: "
            "pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt, of jax's own version"
        )
    return env
