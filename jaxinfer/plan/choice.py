"""A mesh and a batch for a model on a machine, by predicted tokens a second and chip."""

import dataclasses
from collections.abc import Iterator

from jaxinfer.errors import InputError
from jaxinfer.plan.planning import Plan, plan, tokens_per_second
from jaxinfer.plan.request import Request
from jaxinfer.plan.shapes import find_shape
from jaxinfer.plan.topology import parse_topology
from jaxinfer.sharding.mesh import show_mesh

_ROOM = 0.9  # of memory for weights and cache by their shapes; the rest for what the compiler adds


def best(request: Request, most_rows: int = 64) -> Request | None:
    """Return the first of `ranked`; None where none fits."""
    return next(iter(ranked(request, most_rows)), None)


def ranked(request: Request, most_rows: int = 64) -> list[Request]:
    """Return the request with each mesh that fits and its batch, that of the most tokens a second and chip first.

    The model is divided over a power of two of devices, up to 64, or over all; of more of them than it has key heads,
    which would be repeated, in stages too. `most_rows` bounds the rows of each such group. From shapes alone.
    """
    devices = parse_topology(request.topology).devices
    found: list[tuple[float, Request]] = []
    for sizes in _meshes(devices, find_shape(request.model)[0].num_kv_heads):
        mesh = show_mesh({axis: n for axis, n in sizes.items() if n > 1 or axis == "model"})
        asked = dataclasses.replace(request, mesh=mesh, rules="tensor", batch=most_rows * sizes["data"])
        asked = _fitting(asked, most_rows)
        rate = None if asked is None else tokens_per_second(_guess(asked))
        if rate is not None:
            found.append((rate, asked))
    return [asked for _, asked in sorted(found, key=lambda pair: -pair[0])]


def _meshes(devices: int, heads: int) -> Iterator[dict[str, int]]:
    """Yield the meshes to try."""
    for ways in (1 << i for i in range(7)):
        if devices % ways:
            continue
        yield {"data": devices // ways, "model": ways}
        for stages in (2, 4, 8):
            if ways // stages >= heads:
                yield {"data": devices // ways, "stage": stages, "model": ways // stages}


def _fitting(request: Request, rows: int) -> Request | None:
    """Return the request with the most rows, of a power of two for each group and up to `rows`, that fit."""
    try:
        memory = _guess(request).memory
    except InputError:
        return None
    room = (_ROOM * memory.usable - memory.weights) / (memory.cache / rows)
    if room < 1:
        return None
    fit = min(rows, 1 << (int(room).bit_length() - 1))
    return dataclasses.replace(request, batch=request.batch // rows * fit)


def _guess(request: Request) -> Plan:
    return plan(dataclasses.replace(request, phases=("decode",)), compiling=False)
