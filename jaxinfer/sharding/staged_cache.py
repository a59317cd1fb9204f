"""Caches of layers in stages: those that have one place in every stage are one node, as the layers are."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Int

from jaxinfer.ops.placement import first_entry
from jaxinfer.sharding.cache import DividedLayer

STAGE = "stage"  # the mesh axis that divides layers


def staged(spec: PartitionSpec) -> PartitionSpec:
    """Return how the arrays of all stages lie, one after another along the first axis, that lie so within a stage."""
    return PartitionSpec((STAGE, *first_entry(spec)), *spec[1:])


@nnx.dataclass
class StagedLayer(nnx.Module):
    """The caches of the layers that have one place in every stage: their rows, those of a stage after another's.

    `stages.run_stages` appends and attends; what is done between steps is done here, by each stage with its own.
    """

    inner: DividedLayer = nnx.data()
    mesh: AbstractMesh = nnx.static(kw_only=True)

    @property
    def exact_rewind(self) -> int | None:
        """What the cache of each stage has."""
        return self.inner.exact_rewind

    def rewind(self, length: Int[Array, "B"]) -> "StagedLayer":
        """Rewind in every stage."""
        return self._everywhere("rewind", length)

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "StagedLayer":
        """Keep the nodes in every stage."""
        return self._everywhere("keep", start, nodes, counts)

    def stays(self, rows: Int[np.ndarray, "n"]) -> bool:
        """Return what the cache of each stage says."""
        return self.inner.stays(rows)

    def take(self, rows: Int[Array, "n"]) -> "StagedLayer":
        """Copy rows in every stage."""
        return self._everywhere("take", rows)

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "StagedLayer":
        """Copy rows in every stage."""
        return self._everywhere("fork", rows, length, room=room)

    def _everywhere(self, method: str, *given: Array, **options: Any) -> "StagedLayer":
        def call(inner: Any, given: tuple) -> Any:
            return getattr(inner, method)(*given, **options)

        stages, whole = PartitionSpec(STAGE), PartitionSpec()
        divided = jax.shard_map(
            call, mesh=self.mesh, in_specs=(stages, whole), out_specs=stages, axis_names={STAGE}, check_vma=False
        )
        return StagedLayer(divided(self.inner, given), mesh=self.mesh)
