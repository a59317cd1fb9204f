"""Which blocks of slots a row has, and which of their slots a query sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_attention.gpu_plan import Plan

MATRIX = plgpu.Layout.WGMMA
BY_SLOT, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # a number for every slot, and for every query
NUMBER = plgpu.Layout.WG_SPLAT(())  # one for all


class Range:
    """Which blocks of slots row b has, and which of them a split takes.

    Items are the blocks in the order of their slots: those of the sinks, then from the window's first to the last.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], b: Any):
        self._plan = plan
        T, slots = plan.tokens, plan.slots
        self.length = refs["length"][b] if plan.ring else jnp.minimum(refs["length"][b], plan.capacity)
        self.start = refs["start"][b] if plan.has_start else jnp.int32(0)
        self.position = refs["position"][b] if plan.has_position else refs["length"][b] - T
        low = self.lowest = jnp.maximum(self.start, 0)
        if plan.ring:
            self.start = low  # what holds nothing has a negative position
        if plan.tree_words:
            self.end = jnp.maximum(self.length, 0)
            self._highest = self.length - T
        else:
            self.end = jnp.maximum(jnp.minimum(self.length, self.position + T), 0)
            self._highest = jnp.minimum(self.length, self.position + 1)
        if plan.window is not None:
            # The last query's window, the deepest of a tree at most T - 1 below, begins latest.
            low = jnp.maximum(low, self.position + 1 - plan.window)
            self.lowest = jnp.maximum(self.lowest, self.position + T - plan.window)
        if plan.ring:
            low, self.end = jnp.int32(0), jnp.maximum(jnp.minimum(self.length, plan.capacity), 0)
        self._first = jax.lax.div(low, jnp.int32(slots))
        count = jnp.maximum(jax.lax.div(self.end + (slots - 1), jnp.int32(slots)) - self._first, 0)
        self._apart = jnp.int32(0)
        if plan.window is not None and plan.sinks:
            wanted = jnp.minimum(self._first, -(-plan.sinks // slots))
            self._apart = jnp.where((self.start < plan.sinks) & (count > 0), wanted, 0)
        self._items = count + self._apart

    def share(self, split: Any) -> tuple[Any, Any]:
        """Return the first item of a split, and the one after its last."""
        each = jax.lax.div(self._items + (self._plan.splits - 1), jnp.int32(self._plan.splits))
        begin = jnp.minimum(split * each, self._items)
        return begin, jnp.minimum(begin + each, self._items)

    def alive(self) -> tuple[Any, Any]:
        """Return the first slot that holds something, and how many from there on do."""
        return self.start, jnp.maximum(self.length - self.start, 0)

    def base_of(self, item: Any) -> Any:
        """Return the first slot of an item."""
        if self._plan.window is None or not self._plan.sinks:
            return (self._first + item) * self._plan.slots
        return jnp.where(item < self._apart, item, self._first + item - self._apart) * self._plan.slots

    def held(self, slot: Any) -> Any:
        """Return the positions that slots hold, negative where there is none."""
        R = self._plan.capacity
        if not self._plan.ring:
            return slot
        newest = jax.lax.rem(self.length - 1, jnp.int32(R))  # its slot, after which those of the turn before are
        position = slot + (self.length - 1 - newest) - jnp.where(slot > newest, R, 0)
        return jnp.where(slot < R, position, -1)

    def whole(self, base: Any) -> Any:
        """Return whether all queries see all slots of the block that begins at `base`."""
        if self._plan.ring:
            all_seen = (self.length - self._plan.capacity >= self.lowest) & (self._highest >= self.length)
            return all_seen & (base + self._plan.slots <= self._plan.capacity)
        return (base >= self.lowest) & (base + self._plan.slots <= self._highest)


class Mask:
    """Which slots of a block each query sees."""

    def __init__(self, plan: Plan, refs: dict[str, Any], at: Range, b: Any, first_column: Any):
        self._plan, self._refs, self._at, self._b, self._first_column = plan, refs, at, b, first_column

    def seen(self, base: Any) -> Any:
        """Return `[slots, columns]`, bool."""
        plan, at = self._plan, self._at
        shape = (plan.slots, plan.columns)
        slot = at.held(base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX))
        seen = slot >= at.start
        if plan.tree_words:
            node = slot - (at.length - plan.tokens)
            words = [self._of_tree(i) for i in range(plan.tree_words + 1)]
            bits = words[0]
            for i in range(1, plan.tree_words):
                bits = jnp.where(node >= 32 * i, words[i], bits)
            inside = jax.lax.shift_right_logical(bits, node & 31) & 1
            seen = seen & ((node < 0) | ((node < plan.tokens) & (inside == 1)))
            position = at.length - plan.tokens + words[-1]
        else:
            row = self._first_column + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
            position = at.position + (jax.lax.rem(row, plan.tokens) if plan.tokens > 1 else 0)
            seen = seen & (slot < at.length) & (slot <= position)
        if plan.window is not None:
            seen = seen & ((slot > position - plan.window) | (slot < plan.sinks))
        return seen

    def _of_tree(self, i: int) -> Any:
        columns = pl.ds(self._first_column, self._plan.columns)
        words = compat.load(self._refs["tree"].at[self._b, i, columns], BY_COLUMN)
        return wide(words, (self._plan.slots, self._plan.columns), 1)

    def alive(self, base: Any) -> Any:
        """Return a function of a shape and its layout: whether slots, its first axis, hold something."""

        def of(shape: tuple[int, ...], layout: Any) -> Any:
            slot = self._at.held(base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout))
            return (slot >= self._at.start) & (slot < self._at.length)

        return of


def wide(x: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Return a vector along `axis` of `shape`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (axis,)), MATRIX)
