"""Meshes of devices by what people write: `data=4,model=8`."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from jaxinfer.errors import InputError, nearest
from jaxinfer.sharding import processes

THREADS_EACH = 4  # of XLA for each device that is simulated
AXES = {
    "data": "rows of the batch",
    "fsdp": "rows of the batch, and the weights along embed: gathered, or their products summed, where they are used",
    "model": "heads, the mlp's width and the vocabulary",
    "expert": "experts, and what `model` divides where there are none",
    "context": "a row's context: the slots of its cache, and the tokens of its prompt",
    "stage": "layers, in order: hidden states travel from stage to stage",
}


def parse_mesh(text: str) -> dict[str, int]:
    """Return the sizes of `"data=4,model=8"`, in the order in which they are written.

    Raises:
        InputError: an axis of another name, one that is named twice, or a size that is no number above 0.
    """
    sizes: dict[str, int] = {}
    for part in text.replace(" ", "").split(","):
        name, equals, size = part.partition("=")
        if not equals:
            raise InputError(f"mesh {text!r}: {part!r} is not axis=size; write data=4,model=8")
        if name not in AXES:
            raise InputError(f"mesh {text!r}: no axis {name!r}; {nearest(name, AXES)}")
        if name in sizes:
            raise InputError(f"mesh {text!r}: {name} is there twice; give each axis one size")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh {text!r}: {name}={size} must be a whole number, 1 or more")
        sizes[name] = int(size)
    return sizes


def show_mesh(sizes: Mapping[str, int]) -> str:
    """Return what `parse_mesh` reads."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh of these sizes over all devices, or over those given: of a topology that is not there, too.

    Neighbours along the last axes are neighbours in the machine.

    Raises:
        InputError: the sizes are not of as many devices as there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = math.prod(sizes.values())
    if count != len(devices):
        raise InputError(
            f"mesh {show_mesh(sizes)}: takes {count} devices, and there are {len(devices)}; "
            f"{show_mesh(_scaled(sizes, len(devices)))} fits"
        )
    axes = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axes, devices=devices)


def simulate_devices(sizes: Mapping[str, int]) -> None:
    """Let a CPU, if JAX has not begun yet, be as many devices as the mesh takes; other platforms stay as they are."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    count = max(1, math.prod(sizes.values()) // processes.count())
    if count > 1:
        # Exchanges between devices wait in XLA's threads, by default one a device, and where two are on their way with
        # few processors they were seen to hold all of them and wait for each other without end.
        os.environ.setdefault("NPROC", str(THREADS_EACH * count))
    with contextlib.suppress(RuntimeError):  # too late: then what there is must do
        jax.config.update("jax_num_cpu_devices", count)


def _scaled(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Return sizes near to those given whose product is `count`: the later axes keep as much as they can."""
    found = {}
    for name in reversed(sizes):
        found[name] = math.gcd(sizes[name], count)
        count //= found[name]
    out = {name: found[name] for name in sizes}
    first = next(iter(out))
    if count > 1 and first != "data":
        return {"data": count, **out} if "data" not in out else {**out, "data": out["data"] * count}
    return {**out, first: out[first] * count}
