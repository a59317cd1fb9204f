"""Settings near one that does not fit, and do: each is counted from shapes, with what the compiler said of the rest."""

import dataclasses
import math
from collections.abc import Iterator

from jaxinfer.errors import InputError
from jaxinfer.passes import PASSES
from jaxinfer.plan.planning import Memory, Plan
from jaxinfer.plan.request import Request, Target, check
from jaxinfer.sharding.mesh import show_mesh
from jaxinfer.sharding.specs import shard_bytes

COUNT = 3
_PASSES = (("kv_int8",), ("int8",), ("int8", "kv_int8"), ("int4",), ("int4", "kv_int8"))
_CACHE = {name for name, kind in PASSES.items() if kind.about.takes == "cache"}


@dataclasses.dataclass(frozen=True)
class Alternative:
    """A change to a request that makes it fit."""

    change: str
    request: Request
    free: float | int  # bytes left on each device


def alternatives(plan: Plan) -> list[Alternative]:
    """Return the nearest settings that fit, at most three: the smallest change of each kind before a second of one."""
    found: list[tuple[bool, float | int, Alternative]] = []
    kinds: set[str] = set()
    for distance, kind, change, request in sorted(_changes(plan), key=lambda c: c[0]):
        again = kind in kinds
        if sum(again or not second for second, *_ in found) >= COUNT:
            continue  # there are three before it
        try:
            free = _free(plan, check(request))
        except InputError:
            continue  # what the mesh does not divide is no way out
        if free >= 0:
            kinds.add(kind)
            found.append((again, distance, Alternative(change, request, free)))
    return [a for *_, a in sorted(found, key=lambda f: f[:2])[:COUNT]]


def _free(plan: Plan, target: Target) -> float | int:
    """Return the bytes that are left: what a step needs beside weights and cache stays what it was."""
    built, request = target.built, target.request
    cache = shard_bytes(*built.cache(request.batch, request.context))
    memory = plan.memory
    rest = memory.temporaries + memory.code
    return Memory(
        shard_bytes(built.model, built.shardings), cache, rest, 0.0, target.topology.hardware.usable, True
    ).free


def _changes(plan: Plan) -> Iterator[tuple[float | int, str, str, Request]]:
    """Yield changes with their distance: how many halvings of use or doublings of means they are."""
    request, target = plan.request, plan.target
    groups = math.prod(target.sizes[a] for a in target.built.rules.mesh_axes("batch", target.sizes))
    smaller = _largest_batch(plan)
    if smaller and smaller < request.batch:
        yield (
            math.log2(request.batch / smaller), "batch", f"--batch {smaller}",
            dataclasses.replace(request, batch=smaller),
        )  # fmt: skip
    for halvings in range(1, 8):
        context = request.context >> halvings
        if context >= 256:
            prompt = None if request.prompt is None else min(request.prompt, context)
            shorter = dataclasses.replace(request, context=context, prompt=prompt)
            yield halvings, "context", f"--context {context}", shorter
    for doublings in range(1, 5):
        model = target.sizes.get("model", 1) << doublings
        if groups % (1 << doublings) == 0 and "data" in target.sizes:
            sizes = {**target.sizes, "data": target.sizes["data"] >> doublings, "model": model}
            if target.sizes["data"] >> doublings:
                text = show_mesh(sizes)
                yield doublings, "mesh", f"--mesh {text}", dataclasses.replace(request, mesh=text)
        larger = _larger(target, doublings)
        if larger:
            text = show_mesh({**target.sizes, "model": model})
            wider = dataclasses.replace(request, topology=larger, mesh=text)
            yield 1.5 * doublings, "topology", f"--topology {larger} --mesh {text}", wider
    for doublings in range(1, 4):
        for axis in ("data", "model"):
            size = target.sizes.get(axis, 1)
            if size % (1 << doublings) == 0:
                stages = target.sizes.get("stage", 1) << doublings
                rest = {name: n for name, n in target.sizes.items() if name not in ("data", "stage")}
                first = {"data": target.sizes["data"]} if "data" in target.sizes else {}
                text = show_mesh({**first, "stage": stages, **rest, axis: size >> doublings})
                yield 0.9 * doublings, "stages", f"--mesh {text}", dataclasses.replace(request, mesh=text)
    names = {spec.partition(":")[0] for spec in request.passes}
    for i, added in enumerate(_PASSES):
        if (names & _CACHE and "kv_int8" in added) or (names - _CACHE and set(added) - _CACHE):
            continue
        change = " ".join(f"--pass {name}" for name in added)
        yield 0.7 + 0.3 * i, "passes", change, dataclasses.replace(request, passes=(*request.passes, *added))


def _largest_batch(plan: Plan) -> int:
    """Return the largest batch that fits, of as many rows for each group of devices."""
    memory, target = plan.memory, plan.target
    groups = math.prod(target.sizes[a] for a in target.built.rules.mesh_axes("batch", target.sizes))
    room = memory.usable - memory.weights - memory.temporaries - memory.code
    per_row = memory.cache / plan.request.batch
    return max(0, int(room / per_row)) // groups * groups


def _larger(target: Target, doublings: int) -> str | None:
    """Return the name of a machine of the same kind with so many times two as many chips."""
    shape = list(target.topology.shape)
    for _ in range(doublings):
        shape[shape.index(min(shape))] *= 2
    return f"{target.topology.kind}:{'x'.join(map(str, shape))}"
