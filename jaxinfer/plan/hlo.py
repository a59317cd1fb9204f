"""What XLA made of a program, from the text of its optimized HLO: collectives, kernels, loops."""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
# What is no kernel of a GPU's by itself.
_NO_WORK = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
    "replica-id", "while", "conditional", "call", "async-start", "async-update", "async-done",
}  # fmt: skip
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "c64": 64, "token": 0, "opaque": 0}
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_KERNEL = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu)')
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")


class Collective(NamedTuple):
    """One collective: bytes are those of the whole array that a device ends up with or, reduced, began with."""

    kind: str
    bytes: int
    group: tuple[int, ...]  # the devices of the first group, as places in the mesh


class Found(NamedTuple):
    """What a program runs, and how often: collectives, calls of kernels by name, and what is launched, by its kind.

    A launch is an operation by itself, or a fusion: on a GPU a kernel, or a copy.
    """

    collectives: collections.Counter[Collective]
    kernels: collections.Counter[str]
    launches: collections.Counter[str]


def read(text: str) -> Found:
    """Return what the entry of a compiled program's text runs.

    A loop counts as often as it is known to run, else once; of the branches of a conditional the last one counts.
    """
    computations, entry = _computations(text)
    found = Found(collections.Counter(), collections.Counter(), collections.Counter())
    _walk(computations, entry, 1, found)
    return found


def shape_bytes(text: str) -> int:
    """Return the bytes of an HLO shape, or of all parts of a tuple."""
    return sum(_bytes_of(kind, dims) for kind, dims in _parts(text))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith((" ", "\t")):
            lines.append(line)
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int, found: Found, fused: bool = False) -> None:
    for line in computations.get(name, ()):
        operation = _OPERATION.match(line)
        if operation is None:
            continue
        this, shape, kind, rest = operation.groups()
        base = kind.removesuffix("-start")
        if not fused and kind not in _NO_WORK and not kind.endswith("-done"):
            found.launches[base] += times
        if base in KINDS:
            group = _group(rest)
            found.collectives[Collective(base, _moved(base, kind, shape, len(group)), group)] += times
        elif kind == "custom-call" and _KERNEL.search(rest):
            called = re.search(r'/([\w.\-]+)/(?:pallas_call|mpmd_map)"', rest)
            found.kernels[called[1] if called else "kernel"] += times
        elif kind == "while":
            body = re.search(r"body=%?([\w.\-]+)", rest)[1]
            _walk(computations, body, times * _trips(computations, rest), found)
        elif kind == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            last = branches[1].split(",")[-1] if branches else re.search(r"true_computation=(%?[\w.\-]+)", rest)[1]
            _walk(computations, last.strip().lstrip("%"), times, found)
        elif kind in ("call", "fusion", "async-start"):
            # What runs on a TPU while a collective is on its way holds that too, as its end does: its start counts.
            for called in () if this.startswith("async-collective-done") else _CALLED.findall(rest):
                if not called.startswith("async_collective_fusion"):
                    _walk(computations, called, times, found, fused or kind == "fusion")


def _trips(computations: dict[str, list[str]], rest: str) -> int:
    """Return how often a loop runs: as XLA says, or, as libtpu does not, to where its condition counts from 0.

    JAX's loops of a known length all count from there by ones.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(known[1])
    name = re.search(r"condition=%?([\w.\-]+)", rest)
    condition = "\n".join(computations.get(name[1], ())) if name else ""
    below = re.search(r"ROOT .* compare\([^)]*?([\w.\-]+)\), direction=LT", condition)
    bound = below and re.search(rf"{re.escape(below[1])} = s32\[\]\S* constant\((\d+)\)", condition)
    return int(bound[1]) if bound else 1


def _moved(base: str, kind: str, shape: str, devices: int) -> int:
    parts = [_bytes_of(*part) for part in _parts(shape)]
    if kind.endswith("-start") and shape.startswith("(") and base != "all-reduce":
        parts = parts[len(parts) // 2 :] if base != "collective-permute" else parts[:1]  # operands, then results
    return sum(parts) * (devices if base == "reduce-scatter" else 1)


def _group(rest: str) -> tuple[int, ...]:
    """Return the first of a collective's groups of devices, in any of the ways in which HLO writes them."""
    order = r"\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)"
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids={order})?\s*\{{([^}}]*)\}}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.\-]+)'=(\d+)", found[1])}
        over = re.findall(r"'([\w.\-]+)'", found[4])
        places = np.arange(math.prod(sizes.values()))
        by, turned = ([int(n) for n in part.split(",")] if part else None for part in (found[2], found[3]))
        places = places if turned is None else places.reshape(by).transpose(turned)
        places = places.reshape(tuple(sizes.values()))
        return tuple(places[tuple(slice(None) if name in over else 0 for name in sizes)].reshape(-1).tolist())
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        to, by, turned = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
        places = np.arange(math.prod(by)).reshape(by)
        return tuple((places if turned is None else places.transpose(turned)).reshape(to)[0].tolist())
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        return tuple(int(n) for n in found[1].split(","))
    return ()


def _parts(shape: str) -> list[tuple[str, str]]:
    return re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}", "", shape))


def _bytes_of(kind: str, dims: str) -> int:
    bits = _BITS.get(kind) or int((re.search(r"\d+", kind) or ["0"])[0])
    return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)
