"""The copies of a block of pages: each page by itself, all of them waited for at once."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


class PageCopies:
    """The copies of a block's pages into buffer number `buffer` of `to`, `[buffers, pages, ...]`.

    `source(j)` is page j of the block; the first `live` are copied.
    """

    def __init__(self, source: Callable[[Any], Any], to: Any, buffer: Any, semaphore: Any, live: Any):
        self._source, self._to, self._buffer, self._semaphore = source, to, buffer, semaphore
        self._live, self._count = live, to.shape[1]

    def _one(self, j):
        return pltpu.make_async_copy(self._source(j), self._to.at[self._buffer, j], self._semaphore)

    def _whole(self):
        # As many bytes as all pages of the block: one wait for all of their copies.
        return pltpu.make_async_copy(self._to.at[self._buffer], self._to.at[self._buffer], self._semaphore)

    def start(self) -> None:
        """Start them; those of a whole block without a loop, so that its work overlaps with others'."""

        @pl.when(self._live == self._count)
        def _():
            for j in range(self._count):
                self._one(j).start()

        @pl.when(self._live != self._count)
        def _():
            jax.lax.fori_loop(0, self._live, lambda j, _: self._one(j).start() or 0, 0)

    def wait(self) -> None:
        """Wait for them."""

        @pl.when(self._live == self._count)
        def _():
            self._whole().wait()

        @pl.when(self._live != self._count)
        def _():
            jax.lax.fori_loop(0, self._live, lambda j, _: self._one(j).wait() or 0, 0)
