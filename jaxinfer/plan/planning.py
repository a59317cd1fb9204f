"""From a request to its plan: shapes are counted here, programs compiled in another process, and times predicted."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxinfer.models.config import config_to_dict
from jaxinfer.plan.building import CHUNK, cuts
from jaxinfer.plan.compiling import Compiled, ask, combine
from jaxinfer.plan.counts import Work
from jaxinfer.plan.estimates import estimated_collectives, estimated_launches
from jaxinfer.plan.hlo import Collective
from jaxinfer.plan.prediction import Times, network_seconds
from jaxinfer.plan.request import Request, Target, check
from jaxinfer.plan.turns import Step, Turns, step_of, turns_of
from jaxinfer.sharding.specs import shard_bytes

Note = Callable[[str], object]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One kind of step: its work and times on a device, and what the compiler says of it, or why it says nothing."""

    rows: int
    tokens: int
    turns: Turns
    work: Work
    collectives: dict[Collective, float | int]  # as compiled where it was, else as estimated
    launches: float | int  # operations that run by themselves
    times: Times | None  # None where the machine's peaks are not known
    compiled: Compiled | None
    error: str | None = None

    @property
    def estimated(self) -> bool:
        """Whether the collectives are those that were counted, and not those that were compiled."""
        return self.compiled is None or self.compiled.collectives is None


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: float | int
    cache: float | int
    temporaries: float | int
    code: float | int
    usable: float | int | None  # None of a CPU
    estimated: bool  # from shapes alone: nothing was compiled

    @property
    def total(self) -> float | int:
        """All that the program needs."""
        return self.weights + self.cache + self.temporaries + self.code

    @property
    def free(self) -> float | int | None:
        """What is left; below 0 it does not fit."""
        return None if self.usable is None else self.usable - self.total

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.free is None or self.free >= 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found."""

    target: Target
    memory: Memory
    phases: dict[str, Phase]
    prefill: Times | None  # of whole prompts, one for each group that has rows of its own
    seconds: float | int  # that the plan took

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.target.request


def plan(request: Request, note: Note = lambda _: None, compiling: bool = True) -> Plan:
    """Return the plan of a request. Without `compiling`, from shapes alone: temporaries and code are then left out.

    Raises:
        InputError: a mistake in the request, or a compiler that is not installed.
    """
    begin = time.perf_counter()
    target = check(request)
    places, compiled = _compile(target, note) if compiling else (None, {})
    if places is None:
        places = target.topology.coordinates()
    phases = {name: _phase(target, name, places, compiled.get(name)) for name in request.phases}
    memory = _memory(target, [p.compiled for p in phases.values() if p.compiled is not None])
    prefill = _whole_prompt(target, phases["prefill"], places) if "prefill" in phases else None
    return Plan(target, memory, phases, prefill, time.perf_counter() - begin)


def _steps(target: Target) -> dict[str, tuple[int, int]]:
    """Return the rows and new tokens of each phase's step."""
    steps = {"prefill": (target.rows, target.chunk), "decode": (target.request.batch, 1)}
    return {name: steps[name] for name in target.request.phases}


def _compile(target: Target, note: Note) -> tuple[np.ndarray | None, dict[str, Compiled | str]]:
    """Return the places of the mesh's devices, and each phase compiled, or why it is not."""
    request = target.request
    model = target.built.model
    pieces = [(tuple(range(len(model.layers))), 1)] if request.whole else cuts(model)
    jobs = [
        {"name": f"{phase} {i}", "rows": rows, "tokens": tokens, "context": request.context, "layers": list(layers)}
        for phase, (rows, tokens) in _steps(target).items()
        for i, (layers, _) in enumerate(pieces)
    ]
    asked = {
        "config": config_to_dict(target.config),
        "dtype": request.dtype,
        "passes": [*target.saved, *request.passes],
        "topology": target.topology.name,
        "mesh": target.sizes,
        "rules": request.rules,
        "jobs": jobs,
    }
    places, answers = ask(asked, target.topology, note)
    found: dict[str, Compiled | str] = {}
    for phase in request.phases:
        parts = [answers[f"{phase} {i}"] for i in range(len(pieces))]
        errors = [part["error"] for part in parts if "error" in part]
        found[phase] = errors[0] if errors else combine(parts, pieces, request.whole)
    return places, found


def _phase(target: Target, name: str, places: np.ndarray, compiled: Compiled | str | None) -> Phase:
    rows, tokens = _steps(target)[name]
    context = target.prompt if name == "prefill" else target.request.context
    step = step_of(target.built, rows, tokens, context - tokens, target.request.context)
    error = compiled if isinstance(compiled, str) else None
    compiled = None if isinstance(compiled, str) else compiled
    known = None if compiled is None else compiled.collectives
    found = estimated_collectives(target.built, rows, tokens) if known is None else dict(known)
    launches = estimated_launches(target.built) if known is None else compiled.launches
    turns, times = turns_of(target.built, rows, tokens), _times(target, step, found, launches, places)
    return Phase(rows, tokens, turns, step.work, found, launches, times, compiled, error)


def _times(
    target: Target, step: Step, collectives: dict[Collective, float | int], launches: float | int, places: np.ndarray
) -> Times | None:
    hardware = target.topology.hardware
    if hardware is None:
        return None
    return step.times(network_seconds(collectives, places, target.topology.shape, hardware), hardware, launches)


def _whole_prompt(target: Target, phase: Phase, places: np.ndarray) -> Times | None:
    """Return the times of all chunks of a prompt: each attends to those before it."""
    if phase.times is None:
        return None
    total = None
    for start in range(0, target.prompt, CHUNK):
        tokens = min(CHUNK, target.prompt - start)
        step = step_of(target.built, phase.rows, tokens, start, target.request.context)
        times = _times(target, step, phase.collectives, phase.launches, places)  # a shorter last chunk is padded
        total = times if total is None else total + times
    return total


def _memory(target: Target, compiled: Sequence[Compiled]) -> Memory:
    """Return the bytes of weights and of all rows' cache; what a step needs beside them is of the largest step."""
    hardware = target.topology.hardware
    usable = None if hardware is None else hardware.usable
    built = target.built
    cache = shard_bytes(*built.cache(target.request.batch, target.request.context))
    if not compiled:
        return Memory(shard_bytes(built.model, built.shardings), cache, 0.0, 0.0, usable, estimated=True)
    laid_out = max(c.cache for c in compiled)  # of a prefill alone it is the cache of fewer rows
    code = sum(c.code for c in compiled)
    temporaries = max(c.temporaries for c in compiled)
    return Memory(max(c.weights for c in compiled), max(cache, laid_out), temporaries, code, usable, estimated=False)


def tokens_per_second(plan: Plan) -> float | int | None:
    """Return the tokens a second and chip that decode steps give, all rows together; None where no time is known."""
    phase = plan.phases.get("decode")
    if phase is None or phase.times is None:
        return None
    return plan.request.batch / phase.times.step / plan.target.topology.chips
