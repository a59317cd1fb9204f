"""What is to be planned, checked."""

import dataclasses
import math

import jax.numpy as jnp

from jaxinfer.errors import InputError, nearest
from jaxinfer.loading import DTYPES
from jaxinfer.models.config import ModelConfig
from jaxinfer.plan.building import CHUNK, Built, abstract_mesh, build
from jaxinfer.plan.shapes import find_shape
from jaxinfer.plan.topology import Topology, parse_topology
from jaxinfer.sharding.mesh import parse_mesh, show_mesh
from jaxinfer.sharding.rules import DEFAULT

PHASES = ("prefill", "decode")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A model under passes on a machine, and how it is used: `batch` rows of up to `context` tokens each."""

    model: str
    topology: str
    mesh: str = ""  # "" divides the model over all devices
    rules: str = DEFAULT
    passes: tuple[str, ...] = ()
    dtype: str = "bfloat16"
    batch: int = 1
    context: int = 8192
    prompt: int | None = None  # tokens of a prompt; None: the context
    decoder: str = ""
    phases: tuple[str, ...] = PHASES  # what is compiled
    whole: bool = False  # compile all layers, not cuts


@dataclasses.dataclass(frozen=True)
class Target:
    """A request with its names looked up and everything checked: the program as shapes on its mesh."""

    request: Request
    config: ModelConfig
    saved: tuple  # passes that the model was saved with
    topology: Topology
    sizes: dict[str, int]
    built: Built

    @property
    def rows(self) -> int:
        """Rows of a prefill: one prompt for each group of devices that has rows of its own."""
        return min(self.request.batch, self.built.ways("batch", self.request.batch))

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        return self.request.prompt or self.request.context

    @property
    def chunk(self) -> int:
        """Prompt tokens of a dispatch."""
        return min(self.prompt, CHUNK)


def check(request: Request) -> Target:
    """Return what a request asks for.

    Raises:
        InputError: an unknown model, pass, topology or mesh, sizes that do not fit together, or a number out of range.
    """
    for name in ("batch", "context", "prompt"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: must be 1 or more")
    if request.dtype not in DTYPES:
        raise InputError(f"dtype={request.dtype!r}: {nearest(request.dtype, DTYPES)}")
    if request.prompt is not None and request.prompt > request.context:
        raise InputError(f"prompt={request.prompt}: is longer than the context, {request.context}; raise the context")
    topology = parse_topology(request.topology)
    config, saved = find_shape(request.model)
    if request.context > config.max_context:
        raise InputError(
            f"context={request.context}: {request.model} was trained for {config.max_context}; give at most that"
        )
    sizes = parse_mesh(request.mesh) if request.mesh else {"model": topology.devices}
    _check_devices(sizes, topology)
    built = build(config, str(jnp.dtype(request.dtype)), (*saved, *request.passes), abstract_mesh(sizes), request.rules)
    ways = math.prod(sizes[a] for a in built.rules.mesh_axes("batch", sizes))
    if request.batch % ways and ways > 1:
        raise InputError(
            f"batch={request.batch}: is not divided by the {ways} groups of devices that mesh {show_mesh(sizes)} gives "
            f"rows; give a multiple, such as {max(ways, request.batch // ways * ways)}"
        )
    return Target(request, config, saved, topology, sizes, built)


def _check_devices(sizes: dict[str, int], topology: Topology) -> None:
    count = math.prod(sizes.values())
    if count == topology.devices:
        return
    *rest, last = sizes
    others = math.prod(sizes[a] for a in rest)
    fitting = None
    if topology.devices % others == 0:
        fitting = {**sizes, last: topology.devices // others}
    elif topology.devices % sizes[last] == 0:
        fitting = {"data": topology.devices // sizes[last], last: sizes[last]}
    hint = f"; {show_mesh(fitting)} has as many" if fitting else ""
    per_chip = f" ({topology.chips} chips of {topology.devices // topology.chips} devices)"
    raise InputError(
        f"mesh {show_mesh(sizes)}: has {count} devices, and {topology.name} has {topology.devices}"
        + (per_chip if topology.devices != topology.chips else "")
        + hint
    )
