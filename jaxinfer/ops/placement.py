"""Where the axes of arrays lie on a mesh: rules from logical names to mesh axes, and the mesh that is traced for."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

Names = Sequence[str | None]  # a logical name for each axis of an array; None: an axis that is never divided
TOKENS_EACH = 8  # of a device at least, where new tokens are divided


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axes each logical axis is divided over: as many of them, from the first, as divide its size.

    Mesh axes that a mesh does not have are passed over, and one that an axis of the same array has taken already.
    """

    name: str
    table: tuple[tuple[str, tuple[str, ...]], ...]
    about: str = dataclasses.field(default="", compare=False)

    def mesh_axes(self, name: str | None, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh over which a logical axis is to be divided."""
        return tuple(a for a in dict(self.table).get(name, ()) if mesh.get(a, 1) > 1)

    def spec(self, names: Names, sizes: Sequence[int], mesh: Mapping[str, int]) -> PartitionSpec:
        """Return how an array of these axes and sizes lies on a mesh of these sizes."""
        taken: set[str] = set()
        entries = []
        for name, size in zip(names, sizes, strict=True):
            found: tuple[str, ...] = ()
            for axis in self.mesh_axes(name, mesh):
                if axis in taken or size % (mesh[axis] * math.prod(mesh[a] for a in found)):
                    break
                found += (axis,)
            taken.update(found)
            entries.append(found[0] if len(found) == 1 else found or None)
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def row_axes(self, rows: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh over which so many rows of a batch are divided."""
        return first_entry(self.spec(("batch",), (rows,), mesh))

    def token_axes(self, tokens: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
        """Return the axes of the mesh over which a step's new tokens of a row are divided: none of a few tokens."""
        axes = self.mesh_axes("sequence", mesh)
        return axes if divides_tokens(tokens, math.prod(mesh[a] for a in axes)) else ()


def divides_tokens(tokens: int, ways: int) -> bool:
    """Return whether a step's new tokens of a row are divided over so many devices, or whole on each.

    Few take no time to compute with but for the weights and the cache that they read.
    """
    return ways > 1 and tokens % ways == 0 and tokens // ways >= TOKENS_EACH


def first_entry(spec: PartitionSpec | Sequence[str | tuple[str, ...] | None]) -> tuple[str, ...]:
    """Return the mesh axes that divide the first axis of an array."""
    entry = spec[0] if len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def fetch(x: jax.Array) -> np.ndarray:
    """Return an array in host memory, also where its parts are on devices of several processes: all must ask for it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def send(host: Shaped[np.ndarray, "*shape"], sharding: jax.sharding.Sharding | None) -> Shaped[Array, "*shape"]:
    """Return an array where the sharding says; of several processes each gives what its own devices hold."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index], dtype=host.dtype)


_rules = jax.make_user_context(None)  # part of the key of every traced function, as the mesh is


@contextlib.contextmanager
def placed(mesh: Mesh | AbstractMesh, rules: Rules) -> Iterator[None]:
    """Trace for a mesh: ops then divide by themselves what XLA can't."""
    mesh = mesh.abstract_mesh if isinstance(mesh, Mesh) else mesh
    with jax.sharding.use_abstract_mesh(mesh), _rules(rules):
        yield


def free_axes() -> dict[str, int]:
    """Return the axes, by size above 1, of the mesh that is traced for which no `shard_map` has divided yet."""
    mesh = jax.sharding.get_abstract_mesh()
    return {a: mesh.shape[a] for a in mesh.axis_names if a not in mesh.manual_axes and mesh.shape[a] > 1}


def current_rules() -> Rules | None:
    """Return the rules of the mesh that is traced for; None where there is none."""
    return _rules.value
