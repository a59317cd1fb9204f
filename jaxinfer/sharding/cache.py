"""Layers' caches on a mesh: divided by rows, heads and slots, of which each device works on its own, and by stages."""

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.ops.placement import divides_tokens, first_entry
from jaxinfer.sharding.context import Slots

Axes = tuple[str, ...]
STAGE = "stage"  # the mesh axis that divides layers


def staged(spec: PartitionSpec) -> PartitionSpec:
    """Return how the arrays of all stages lie, one after another along the first axis, that lie so within a stage."""
    return PartitionSpec((STAGE, *first_entry(spec)), *spec[1:])


@nnx.dataclass
class DividedLayer(nnx.Module):
    """Any layer cache under `shard_map`: what it holds is `[B, K, ...]`, and rows and heads never read one another.

    So a cache needs no code for a mesh, kernels run on what a device has, and nothing of it is ever moved. Where slots
    are divided too, a cache is one that attends over a part of them; see `Slots`.
    """

    inner: Any = nnx.data()
    mesh: AbstractMesh = nnx.static(kw_only=True)
    rows: Axes = nnx.static(kw_only=True)  # axes of the mesh that divide the batch
    heads: Axes = nnx.static(kw_only=True)  # that divide key heads, and with them the query heads that read them
    slots: Axes = nnx.static(default=(), kw_only=True)  # that divide the context: slots, and the tokens of a prompt

    @property
    def exact_rewind(self) -> int | None:
        """What the cache inside has."""
        return self.inner.exact_rewind

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "DividedLayer":
        """Append on every device the rows and heads that are its own."""
        return self._around(self._everywhere("append", k, v, start, counts, tokens=self._tokens(k.shape[1]))[1])

    def attend(
        self, q: Float[Array, "B T N H"], positions: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B T N H"], "DividedLayer"]:
        """Attend on every device with the query heads that read its own."""
        tokens = self._tokens(q.shape[1]) if options.get("tree") is None else ()
        y, inner = self._everywhere("attend", q, positions, tokens=tokens, **options)
        return y, self._around(inner)

    def rewind(self, length: Int[Array, "B"]) -> "DividedLayer":
        """Rewind on every device."""
        return self._around(self._everywhere("rewind", length)[1])

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "DividedLayer":
        """Keep on every device the nodes of its rows."""
        return self._around(self._everywhere("keep", start, nodes, counts)[1])

    def take(self, rows: Int[Array, "n"]) -> "DividedLayer":
        """Copy rows, wherever they lie."""
        return self._around(self.inner.take(rows))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "DividedLayer":
        """Copy rows, wherever they lie."""
        return self._around(self.inner.fork(rows, length, room))

    def _around(self, inner: Any) -> "DividedLayer":
        return DividedLayer(inner, mesh=self.mesh, rows=self.rows, heads=self.heads, slots=self.slots)

    def _tokens(self, count: int) -> Axes:
        """Return the axes that divide so many new tokens."""
        return self.slots if divides_tokens(count, math.prod(self.mesh.shape[axis] for axis in self.slots)) else ()

    def _everywhere(self, method: str, *given: Array, tokens: Axes = (), **options: Any) -> tuple[Any, Any]:
        """Return what the cache's method gives where each device calls it with its part: an output or None, a cache.

        The tokens of heads that go in and out are divided over the axes `tokens`.
        """
        arrays = {name: x for name, x in options.items() if any(hasattr(leaf, "ndim") for leaf in jax.tree.leaves(x))}
        fixed = {name: x for name, x in options.items() if name not in arrays}

        def call(inner: Any, given: tuple, arrays: dict) -> tuple[Any, Any]:
            out = getattr(inner, method)(*given, **arrays, **fixed)
            return out if isinstance(out, tuple) else (None, out)

        def call_part(inner: Any, given: tuple, arrays: dict) -> tuple[Any, Any]:
            return call(Slots(inner, self.slots, bool(tokens)) if self.slots else inner, given, arrays)

        y, inner = jax.eval_shape(call, self.inner, given, arrays)
        held = lambda tree: jax.tree.map(self._held, tree)  # noqa: E731
        passed = lambda tree: jax.tree.map(lambda x: self._passed(x, tokens), tree)  # noqa: E731
        asked = {name: jax.tree.map(lambda _, x=x: self._asked(x), x) for name, x in arrays.items()}
        manual = jax.sharding.get_abstract_mesh().manual_axes  # those of a stage, inside which this one is
        divided = jax.shard_map(
            call_part,
            mesh=None if manual else self.mesh,
            axis_names=set(self.mesh.axis_names) - set(manual),
            in_specs=(held(self.inner), passed(given), asked),
            out_specs=(passed(y), held(inner)),
            check_vma=False,
        )
        return divided(self.inner, given, arrays)

    def _held(self, x: Any) -> PartitionSpec:
        """Return how an array of the cache lies: `[B, K, ...]`, of divided slots `[B, K, S, ...]`, or `[B]`."""
        return PartitionSpec(*(self.rows, self.heads, self.slots)[: x.ndim])

    def _asked(self, option: Any) -> PartitionSpec:
        """Return how an option lies: a tree of tokens is `[T, T]`, one for all rows, or `[B, T, T]`, one a row."""
        each = max(leaf.ndim for leaf in jax.tree.leaves(option)) > 2
        return PartitionSpec(self.rows) if each else PartitionSpec()

    def _passed(self, x: Any, tokens: Axes) -> PartitionSpec:
        """Return how what goes in and out lies: `[B, T, heads, H]`, or `[B, ...]`."""
        return PartitionSpec(self.rows, tokens, self.heads) if x.ndim == 4 else PartitionSpec(self.rows)


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
