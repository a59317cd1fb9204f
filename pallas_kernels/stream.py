"""A stream of copies from HBM through a few VMEM buffers: rows of items, the next ones on their way while one is used.

Rows have different numbers of items, and the copies run on from the end of a row into the next: no row waits for its
first item but the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat

STATE = 4  # int32 in SMEM: the next row to copy for, its next item, copies started, copies used


class Stream:
    """Copies of `items(row)` items of each of `rows` rows, in order, `depth` of them in flight.

    `copies(row, item, buffer)` returns what to copy into buffer number `buffer`. The state outlives grid steps.
    """

    def __init__(
        self,
        state: Any,
        depth: int,
        rows: Any,
        items: Callable[[Any], Any],
        copies: Callable[[Any, Any, Any], list[Any]],
        first_row: Any = 0,
    ):
        self._state, self._depth, self._rows = state, depth, rows
        self._items, self._copies, self._first_row = items, copies, first_row

    def begin(self) -> None:
        """Start the first `depth - 1` copies; once, before any row is used."""
        self._state[0] = jnp.int32(self._first_row) - 1
        self._state[1] = jnp.int32(0)
        self._state[2] = jnp.int32(0)
        self._state[3] = jnp.int32(0)
        self._next_row()
        for _ in range(self._depth - 1):
            self._start()

    def take(self, row: Any, item: Any) -> Any:
        """Start one more copy, wait for this item's, and return the number of its buffer."""
        self._start()
        buffer = jax.lax.rem(self._state[3], self._depth)
        for copy in self._copies(row, item, buffer):
            copy.wait()
        self._state[3] += 1
        return buffer

    def _start(self) -> None:
        row = self._state[0]

        @pl.when(row < self._rows)
        def _():
            item = self._state[1]
            for copy in self._copies(row, item, jax.lax.rem(self._state[2], self._depth)):
                copy.start()
            self._state[2] += 1
            self._state[1] = item + 1

            @pl.when(item + 1 >= self._items(row))
            def _():
                self._next_row()

    def _next_row(self) -> None:
        """Go to the next row that has an item."""

        def empty(row):
            return (row < self._rows) & (self._items(jnp.minimum(row, self._rows - 1)) == 0)

        self._state[1] = jnp.int32(0)
        self._state[0] = jax.lax.while_loop(empty, lambda row: row + 1, self._state[0] + 1)


def state() -> Any:
    """Return the scratch shape of a stream's state."""
    return compat.SMEM((STATE,), jnp.int32)
