"""Which pages a block of slots is in, on a GPU."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pages:
    """`number` pages of `size` slots, of which a row has `most`; a block of `slots` has whole ones, or part of one."""

    number: int
    size: int
    most: int
    slots: int

    @property
    def part(self) -> int:
        """Slots that are copied at a time."""
        return min(self.size, self.slots)

    @property
    def parts(self) -> int:
        """Copies of a block."""
        return self.slots // self.part

    def find(self, table: Any, b: Any, base: Any, end: Any) -> list[tuple[Any, Any]]:
        """Return of each part of the block from slot `base` of row b its page, and its first slot there.

        A page past the `end` is none: its number is past the last, where a copy reads zeros and no memory.
        """
        found = []
        for i in range(self.parts):
            first = base + i * self.part
            index = jax.lax.div(first, jnp.int32(self.size))
            number = jnp.where(first < end, table[b, jnp.minimum(index, self.most - 1)], self.number)
            found.append((number, first - index * self.size if self.size > self.part else 0))
        return found
