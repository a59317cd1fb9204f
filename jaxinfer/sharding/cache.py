"""Layers' caches on a mesh: divided by rows, heads and slots, of which each device works on its own."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Cache
from jaxinfer.ops.placement import Rules, divides_tokens
from jaxinfer.sharding.context import Slots, slots_on
from jaxinfer.sharding.names import cache_names
from jaxinfer.tree import replace

Axes = tuple[str, ...]


def empty_cache(
    create: Callable[[int, int], Cache], batch: int, slots: int, mesh: Mapping[str, int], rules: Rules
) -> Cache:
    """Return an empty cache that a mesh divides: what `create(rows, slots)` gives for a device's rows, end to end.

    Pages are then in a pool of the device's own, and its tables tell numbers in that.
    """
    ways = math.prod(mesh[axis] for axis in rules.row_axes(batch, mesh))
    return repeated(create(batch // ways, slots_on(slots, mesh, rules)), ways)


def repeated(tree: Any, times: int) -> Any:
    """Return a tree of arrays, each so many times along its first axis."""
    return jax.tree.map(lambda x: jnp.tile(x, (times, *(1,) * (x.ndim - 1))), tree)


@nnx.dataclass
class DividedLayer(nnx.Module):
    """Any layer cache under `shard_map`: rows and heads never read one another.

    So a cache needs no code for a mesh, kernels run on what a device has, and nothing of it is moved but rows that are
    taken to other devices. Where slots are divided too, a cache is one that attends over a part of them; see `Slots`.
    """

    inner: Any = nnx.data()
    mesh: AbstractMesh = nnx.static(kw_only=True)
    rules: Rules = nnx.static(kw_only=True)
    batch: int = nnx.static(kw_only=True)  # rows, of all devices

    @property
    def rows(self) -> Axes:
        """The axes of the mesh that divide the batch."""
        return self.rules.row_axes(self.batch, self.mesh.shape)

    @property
    def heads(self) -> Axes:
        """The axes that divide key heads, and with them the query heads that read them."""
        return self.rules.mesh_axes("kv_heads", self.mesh.shape)

    @property
    def slots(self) -> Axes:
        """The axes that divide the context: slots, and the tokens of a prompt."""
        return self.rules.mesh_axes("sequence", self.mesh.shape)

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
        """Copy rows, wherever they lie: where devices have different ones, all get those that any of them asks for."""
        if not self.rows:
            return self._of_rows("take", self.inner, (), rows)
        pools = self._ways(self.rows)
        joined = jax.tree.map(
            lambda node: node.joined(pools) if hasattr(node, "joined") else node,
            self.inner,
            is_leaf=lambda node: hasattr(node, "joined"),
        )
        return self._of_rows("take", joined.take(rows), (), jnp.arange(len(rows)))

    def stays(self, rows: Int[np.ndarray, "n"]) -> bool:
        """Return whether the device of row i of a fork has row rows[i], for all i: it has all that are not divided."""
        if not self.rows:
            return True
        each, ways = self.batch // self._ways(self.rows), self._ways(self.rules.row_axes(len(rows), self.mesh.shape))
        own = np.arange(len(rows)) // (len(rows) // ways)
        return each * ways == self.batch and bool((rows // each == own).all())

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "DividedLayer":
        """Fork on every device rows that it has: see `stays`."""
        return self._of_rows("fork", self.inner, self.rows, rows, length, room=room)

    def _around(self, inner: Any) -> "DividedLayer":
        return replace(self, inner=inner)

    def _ways(self, axes: Axes) -> int:
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def _tokens(self, count: int) -> Axes:
        """Return the axes that divide so many new tokens."""
        return self.slots if divides_tokens(count, self._ways(self.slots)) else ()

    def _of_rows(self, method: str, inner: Any, over: Axes, rows: Array, *given: Array, **fixed: Any) -> "DividedLayer":
        """Return the cache of rows that each device makes, by a method, out of those that it has of `inner`.

        The axes `over` divide the rows that are there.
        """
        n, each = len(rows), self.batch // self._ways(over)
        into = self.rules.row_axes(n, self.mesh.shape)

        def call(inner: Any, rows: Array, *given: Array) -> Any:
            return getattr(inner, method)(rows, *given, **fixed)

        def call_part(inner: Any, rows: Array, *given: Array) -> Any:
            return call(inner, rows - jax.lax.axis_index(over) * each if over else rows, *given)

        made = jax.eval_shape(call, inner, rows, *given)
        asked = tuple(PartitionSpec(into) for _ in (rows, *given))
        run = self._divided(call_part, (self._held(inner, over), *asked), self._held(made, into))
        return replace(self, inner=run(inner, rows, *given), batch=n)

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
        passed = lambda tree: jax.tree.map(lambda x: self._passed(x, tokens), tree)  # noqa: E731
        asked = {name: jax.tree.map(lambda _, x=x: self._asked(x), x) for name, x in arrays.items()}
        run = self._divided(
            call_part,
            (self._held(self.inner, self.rows), passed(given), asked),
            (passed(y), self._held(inner, self.rows)),
        )
        return run(self.inner, given, arrays)

    def _divided(self, call: Callable, taken: Any, given: Any) -> Callable:
        """Return the call as each device makes it, with its parts of what it takes and gives."""
        manual = jax.sharding.get_abstract_mesh().manual_axes  # those of a stage, inside which this one is
        return jax.shard_map(
            call,
            mesh=None if manual else self.mesh,
            axis_names=set(self.mesh.axis_names) - set(manual),
            in_specs=taken,
            out_specs=given,
            check_vma=False,
        )

    def _held(self, inner: Any, rows: Axes) -> Any:
        """Return how each array lies of a cache whose rows are divided by some axes."""
        axes = {"batch": rows, "kv_heads": self.heads, "sequence": self.slots, None: ()}
        specs = [PartitionSpec(*(axes[name] for name in names)) for names in cache_names(inner)]
        return jax.tree.unflatten(jax.tree.structure(inner), specs)

    def _asked(self, option: Any) -> PartitionSpec:
        """Return how an option lies: a tree of tokens is `[T, T]`, one for all rows, or `[B, T, T]`, one a row."""
        each = max(leaf.ndim for leaf in jax.tree.leaves(option)) > 2
        return PartitionSpec(self.rows) if each else PartitionSpec()

    def _passed(self, x: Any, tokens: Axes) -> PartitionSpec:
        """Return how what goes in and out lies: `[B, T, heads, H]`, or `[B, ...]`."""
        return PartitionSpec(self.rows, tokens, self.heads) if x.ndim == 4 else PartitionSpec(self.rows)
