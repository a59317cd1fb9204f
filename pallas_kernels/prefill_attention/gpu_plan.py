"""Which blocks of slots each block of queries reads on a GPU, and which of them need a mask: scalar arithmetic."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.calls import div, rem
from pallas_kernels.prefill_attention.reach import Packed, reach

ROWS = 64  # queries of a warpgroup: what its matrix instruction takes
TILE = 64  # lanes of a tile in shared memory
SECTION_BYTES = 32 * 2**20  # of keys and values that blocks running together read: they stay in the L2 cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """How queries and slots are cut into blocks, and what a query sees."""

    B: int
    T: int
    S: int
    N: int
    K: int
    queries: int  # a block
    slots: int  # a block
    window: int | None
    sinks: int
    ragged: bool
    lists: tuple[int, int] | None = None  # heads with lists of their own, blocks in a list where it is sparse
    sparse_block: tuple[int, int] | None = None
    bounded: bool = True  # `length` may be less than S, of a row or of a block of queries
    together: int = 1  # key heads, of whatever rows, whose blocks run together
    packed: Packed | None = None  # where slots are those of packed groups
    processors: int = 1  # that share the tiles: a block of queries of a head is one

    @property
    def blocks(self) -> int:
        """Blocks of queries a row."""
        return -(-self.T // self.queries)

    @property
    def all_tiles(self) -> int:
        """Tiles of all rows and heads."""
        return self.B * self.N * self.blocks

    def tile(self, processor: Any, turn: Any) -> Any:
        """Return a processor's tile at a turn: every other turn in reverse, so that none has the longest each time."""
        return turn * self.processors + jnp.where(rem(turn, 2) == 0, processor, self.processors - 1 - processor)

    def tiles(self, processor: Any) -> Any:
        """Return how many tiles a processor has."""
        turns, rest = divmod(self.all_tiles, self.processors)
        return (
            turns + (self.tile(processor, jnp.int32(turns)) < self.all_tiles).astype(jnp.int32)
            if rest
            else jnp.int32(turns)
        )

    def at(self, index: Any) -> tuple[Any, Any, Any]:
        """Return b, query head and block of queries of a tile.

        The query heads of the key heads that run together come first, then the blocks, the longest of them first so
        that the last to run are short, then other key heads.
        """
        heads = self.together * (self.N // self.K)
        section = div(index, heads * self.blocks)
        within = rem(index, heads * self.blocks)
        head = section * heads + rem(within, heads)
        return div(head, self.N), rem(head, self.N), self.blocks - 1 - div(within, heads)


def together(pairs: int, slot_bytes: int, S: int) -> int:
    """Return how many of `pairs` key heads run together: a divisor, whose keys and values fit a part of the cache."""
    most = max(SECTION_BYTES // (slot_bytes * S), 1)
    return next(n for n in range(min(most, pairs), 0, -1) if pairs % n == 0)


class Items:
    """The blocks of slots of a block of queries, one after the other: from the last to the first, then the sinks'."""

    def __init__(self, plan: Plan, refs: dict[str, Any], b: Any, head: Any, i: Any):
        self._plan, self._refs = plan, refs
        slots = plan.slots
        self.position = refs["position"][b] if "position" in refs else jnp.int32(0)
        length = jnp.minimum(refs["length"][b], plan.S) if "length" in refs else jnp.int32(plan.S)
        self.at = self.position + i * plan.queries
        last = self.position + jnp.minimum((i + 1) * plan.queries, plan.T) - 1
        if plan.lists is not None:
            x = div(head, plan.N // plan.lists[0])
            bq, bk = plan.sparse_block
            self._row = (b * plan.lists[0] + x) * (-(-plan.T // bq)) + div(i, bq // plan.queries)
            self._parts = bk // slots
            count = refs["counts"][self._row]
            length = jnp.where(count > 0, length, 0)  # one block is read whatever there is, and hidden
            self.total = jnp.maximum(count * self._parts, 1)
        self.length = length

        def up_to(at: Any) -> Any:
            """Return the slot that a query at a position sees up to, of those that there are."""
            return jnp.maximum(jnp.minimum(reach(at, plan.packed), length), 0)

        self._high = up_to(self.at)  # the least
        low = high = jnp.int32(0)  # the least and the most slot that a query sees from
        if plan.ragged:
            low, high = refs["low_min"][b * plan.blocks + i], refs["low_max"][b * plan.blocks + i]
        if plan.window is not None:
            low = jnp.maximum(low, self.at - plan.window + 1)
            high = jnp.maximum(high, last - plan.window + 1)
        self._low = high
        if plan.lists is not None:
            return
        end = div(up_to(last) + slots - 1, slots)
        first = div(low, slots)
        self._last = jnp.maximum(end - 1, 0)
        self._count = jnp.maximum(end - first, 0)
        self._apart = jnp.int32(0)
        if plan.sinks:
            self._apart = jnp.minimum(jnp.minimum(end, -(-plan.sinks // slots)), first)
        self.total = jnp.maximum(self._count + self._apart, 1)
        # Items from `whole[0]` to `whole[1]` need no mask.
        whole_end = jnp.clip(div(self._high, slots), first, jnp.maximum(end, first))
        whole_first = jnp.clip(div(self._low + slots - 1, slots), first, whole_end)
        self.whole = (end - whole_end, end - whole_first)

    def block(self, item: Any) -> Any:
        """Return which block of slots an item is."""
        if self._plan.lists is not None:
            entry = self._refs["lists"][self._row * self._plan.lists[1] + div(item, self._parts)]
            return entry * self._parts + rem(item, self._parts)
        main = self._last - item
        if not self._plan.sinks:
            return main
        # Where there is no item at all, the one that is read is any block: it is hidden.
        return jnp.maximum(jnp.where(item < self._count, main, self._apart - 1 - (item - self._count)), 0)

    def is_whole(self, base: Any) -> Any:
        """Return whether every query sees every slot of a block that begins at slot `base`."""
        return (base >= self._low) & (base + self._plan.slots <= self._high)

    def seen(self, at: jax.Array, low: jax.Array | None) -> tuple[jax.Array | None, jax.Array]:
        """Return the slots that queries at positions `at` see from and up to, the sinks apart; from None: from 0.

        `low`: where the sequence of each begins.
        """
        plan = self._plan
        end = reach(at, plan.packed)
        end = jnp.minimum(end, self.length) if plan.bounded else end
        if plan.window is not None:
            first = at - plan.window + 1
            low = first if low is None else jnp.maximum(low, first)
        return low, end


def stage_of(count: Any, stages: int) -> Any:
    """Return where in the ring the block after `count` others is."""
    return count & (stages - 1) if stages & (stages - 1) == 0 else rem(count, stages)
