"""The blocks of a split's share of a row on their way to shared memory: a ring of stages keeps the copies ahead."""

from typing import Any

import jax
from jax.experimental import pallas as pl

from pallas_kernels.decode_attention.gpu_masks import Range
from pallas_kernels.decode_attention.gpu_plan import Plan


class Stream:
    """Copies of items `begin` to `end`; an item's keys and values lie at its stage."""

    def __init__(
        self, plan: Plan, source: Any, refs: dict[str, Any], memory: dict[str, Any], at: Range, b: Any, head: Any,
        begin: Any, end: Any,
    ):  # fmt: skip
        self._plan, self._source, self._refs, self._memory, self._at = plan, source, refs, memory, at
        self._b, self._head, self._begin, self._end = b, head, begin, end

    def stage(self, item: Any) -> Any:
        """Return the stage of an item."""
        return jax.lax.rem(item - self._begin, self._plan.stages)

    def place(self, item: Any) -> Any:
        """Return where an item lies in the cache."""
        return self._source.find(self._refs, self._b, self._head, self._at.base_of(item), self._at.end)

    def load(self, item: Any, where: Any, names: str) -> None:
        """Start to copy what an item has of "k" and "v"."""
        for name in names:
            self._source.copies(self._refs, self._memory, name, where, self.stage(item))

    def fill(self) -> None:
        """Start to copy the first items, one a stage; all of them are looked up before any is waited for."""
        items = [self._begin + ahead for ahead in range(self._plan.stages)]
        for item, where in zip(items, [self.place(item) for item in items], strict=True):

            @pl.when(item < self._end)
            def _(item=item, where=where):
                self.load(item, where, "kv")

    def next(self, item: Any, meet: Any) -> None:
        """Start to copy the item that takes the stage of `item`, after all have read that: `meet` waits for them."""
        later = item + self._plan.stages
        where = self.place(later)

        @pl.when(later < self._end)
        def _():
            meet()
            self.load(later, where, "kv")
