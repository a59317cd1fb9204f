"""What each block of queries has to read: a few scalars a block, computed before the kernel starts."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.calls import Known, div, rem, scalar_math
from pallas_kernels.prefill_attention.reach import Packed, reach

SMEM_ENTRIES = 1 << 16  # scalars of block lists: 256 KiB, which every chip's SMEM holds beside the rest


@dataclasses.dataclass(frozen=True)
class Plan:
    """How queries and slots are cut into blocks, and what a query sees."""

    B: int
    T: int
    S: int
    heads: int  # of lists of queries: key heads, or query heads where these have lists of their own
    queries: int  # a block
    slots: int  # a block
    window: int | None
    sinks: int
    sequences: int | None  # boundaries a row where it is ragged
    most: int | None  # blocks in a list where it is sparse
    packed: Packed | None = None  # where slots are those of packed groups

    @property
    def blocks(self) -> int:
        """Blocks of queries a row."""
        return -(-self.T // self.queries)

    def reach(self, at: Any) -> Any:
        """Return the slot that a query at a position sees up to, not included."""
        return reach(at, self.packed)

    def scalars(
        self,
        position: Int[Known, "B"],
        length: Int[Known, "B"],
        starts: Int[Known, "B _"] | None,
        counts: Int[Known, "B X _"] | None,
        lists: Int[Known, "B X _ most"] | None,
    ) -> list[Known]:
        """Return the scalars of `Ranges`, numpy arrays where all that they come from are."""
        found = list(scalar_math(self._ranges, position, length, starts))
        if lists is not None:
            found += scalar_math(lambda a, b: (jnp.ravel(a), jnp.ravel(b)), counts, lists)
        return found

    def _ranges(self, position, length, starts):
        position, length = jnp.asarray(position, jnp.int32), jnp.minimum(jnp.asarray(length, jnp.int32), self.S)
        # Tokens past the last one are padding: they see what the last one sees, so that no block is masked for them.
        token = jnp.minimum(jnp.arange(self.blocks * self.queries, dtype=jnp.int32), self.T - 1)[None]
        at = position[:, None] + token
        high = jnp.maximum(jnp.minimum(self.reach(at), length[:, None]), 0)
        low, extra = jnp.zeros_like(at), []
        if starts is not None:
            starts = jnp.asarray(starts, jnp.int32)
            before = (starts[:, None] <= token[..., None]).sum(-1)  # the boundaries up to a token
            low = jnp.take_along_axis(starts, jnp.maximum(before - 1, 0), axis=1)
            low = jnp.where(before == 0, self.S, low)
            before = before.reshape(self.B, self.blocks, self.queries)
            extra = [starts, jnp.maximum(before[..., 0] - 1, 0), before[..., -1]]
        if self.window is not None:
            low = jnp.maximum(low, at - self.window + 1)
        low, high = (x.reshape(self.B, self.blocks, self.queries) for x in (low, high))
        alive = low < high
        first = jnp.where(alive, low, self.S).min(-1) // self.slots
        end = -(-jnp.where(alive, high, 0).max(-1) // self.slots)
        apart = jnp.zeros_like(first)
        if self.window is not None and self.sinks:
            apart = jnp.minimum(-(-jnp.minimum(self.sinks, high.max(-1)) // self.slots), first)
        count = jnp.maximum(end - first, 0)
        return tuple(
            jnp.ravel(x).astype(jnp.int32)
            for x in (position, length, first, count, apart, low.max(-1), high.min(-1), *extra)
        )


class Ranges:
    """A plan inside the kernel. A row of it is a block of queries of one head: `(b * heads + head) * blocks + i`."""

    def __init__(self, plan: Plan, refs: Sequence[Any]):
        refs = list(refs)
        self.plan = plan
        self.position, self.length, self.first, self.count, self.apart, self.low, self.high = refs[:7]
        refs = refs[7:]
        if plan.sequences is not None:
            self.starts, self.before, self.after = refs[:3]
            refs = refs[3:]
        if plan.most is not None:
            self.counts, self.lists = refs

    def at(self, row: Any) -> tuple[Any, Any, Any]:
        """Return b, head and i of a row."""
        return div(row, self.plan.heads * self.plan.blocks), self._head(row), rem(row, self.plan.blocks)

    def _head(self, row: Any) -> Any:
        return rem(div(row, self.plan.blocks), self.plan.heads)

    def _index(self, row: Any) -> Any:
        b, _, i = self.at(row)
        return b * self.plan.blocks + i

    def items(self, row: Any) -> Any:
        """Return how many blocks of slots a row reads."""
        if self.plan.most is not None:
            return self.counts[row]
        return self.count[self._index(row)] + self.apart[self._index(row)]

    def block(self, row: Any, item: Any) -> Any:
        """Return which block of slots an item is: of the list, or the sinks' first and then the rest."""
        if self.plan.most is not None:
            return self.lists[row * self.plan.most + item]
        index = self._index(row)
        apart = self.apart[index]
        return jnp.where(item < apart, item, self.first[index] + item - apart)

    def whole(self, row: Any, block: Any) -> Any:
        """Return whether every query of a row sees every slot of a block."""
        index, base = self._index(row), block * self.plan.slots
        return (base >= self.low[index]) & (base + self.plan.slots <= self.high[index])


def seen(
    plan: Plan, at: Int[Array, "R 1"], low: Int[Array, "R 1"] | None, slot: Int[Array, "1 S"], length: Any
) -> Array:
    """Return `[R, S]`, which slots queries at positions `at`, whose sequences begin at `low`, see."""
    found = slot < jnp.minimum(plan.reach(at), length)
    if low is not None:
        found &= slot >= low
    if plan.window is not None:
        near = slot > at - plan.window
        found &= near | (slot < plan.sinks) if plan.sinks else near
    return found
