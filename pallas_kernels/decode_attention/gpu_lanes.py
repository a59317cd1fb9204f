"""Where a thread of a warp stands, and where in shared memory what it reads of a block lies: see `gpu_warp`.

Eight threads read 16 bytes each at a time, and never meet in a bank, where a line has 128 bytes.
"""

import dataclasses
import math
from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words

LOG2E = math.log2(math.e)
NOTHING = -1e30  # the score of a slot that is not seen
LEAST = -1e20  # where the peak begins: what is not seen has a weight of exactly 0, also before anything is seen


@dataclasses.dataclass(frozen=True)
class Tile:
    """The sizes of a warp's work, and what is seen."""

    slots: int  # of a warp in a block
    line: int  # bytes of a slot that lie together in shared memory, 64 or 128
    lines: int
    rows: int
    tokens: int
    factor: float  # of the scores, to base 2, or before the cap
    softcap: float | None
    window: int | None
    sinks: int
    tree_words: int
    operands: Any  # what the codes are multiplied as: of `gpu_operands`

    @property
    def own(self) -> int:
        """Numbers of the output in a thread."""
        return self.lines * self.line // 4

    @property
    def sums(self) -> int:
        """Numbers of a thread from block to block: those of the output, the peak and the total."""
        return self.own + 2

    @property
    def queries(self) -> int:
        """Words of the queries in a thread: 16 bits a number."""
        return 2 * self.own // 4

    @property
    def fixed(self) -> int:
        """Words of a thread that stay: the queries, the factor of its row, and what it sees."""
        return self.queries + 1 + 4 + self.tree_words

    @property
    def scores(self) -> int:
        """Scores of a thread in a block."""
        return self.slots // 4


class Lane:
    """Where a thread stands: its warp, its row, and its number of the four of that row."""

    def __init__(self):
        index = words.thread()
        self.index = words.both(index, 31)
        self.warp = words.right(index, 5)
        self.row = words.both(words.right(index, 2), 7)
        self.quarter = words.both(index, 3)


def over_four(combine: Any, value: Any) -> Any:
    """Return a float combined over the four threads of a row."""
    for distance in (1, 2):
        value = combine(value, words.neighbour(value, distance))
    return value


def words_of(values: list[Any], letters: str) -> list[Any]:
    """Return an even number of floats as words of numbers of a type: "f32", "bf16" or "f16"."""
    if letters == "f32":
        return [words.as_word(value) for value in values]
    pair = words.pair_of if letters == "bf16" else words.half_pair_of
    return [pair(*values[i : i + 2]) for i in range(0, len(values), 2)]


def two_floats(word: Any) -> tuple[Any, Any]:
    """Return the two bfloat16 numbers of a word."""
    return words.as_float(words.right(word, -16)), words.as_float(words.both(word, 0xFFFF0000))


def two_scales(address: Any, size: int) -> tuple[Any, Any]:
    """Return the two scales at an address."""
    if size == 4:
        low, high = words.several(address, 2)
        return words.as_float(low), words.as_float(high)
    return two_floats(words.as_word(words.read(address, 4)))


def at_scales(tile: Tile, lane: Lane, scales: Any) -> Any:
    """Return where the scales of the thread's first two slots lie."""
    slot = words.add(words.times(lane.warp, tile.slots), words.times(lane.quarter, 2))
    return words.onward(words.pointer(scales), words.times(slot, words.width(scales)))


def at_keys(tile: Tile, lane: Lane, keys: Any) -> list[Any]:
    """Return where the thread's pieces of 16 bytes of its first slot of keys lie: that of its row's number."""
    base = words.onward(words.pointer(keys), words.times(lane.warp, tile.slots * tile.line * tile.lines))
    base = words.onward(base, words.times(lane.row, tile.line))
    if tile.line == 64:
        return [words.onward(base, words.times(words.differ(lane.quarter, words.right(lane.row, 1)), 16))]
    pieces = [words.add(words.times(lane.quarter, 2), c) for c in (0, 1)]
    return [words.onward(base, words.times(words.differ(piece, lane.row), 16)) for piece in pieces]


def at_values(tile: Tile, lane: Lane, values: Any) -> list[Any]:
    """Return where the thread's pieces of its first two slots of values lie: that of its row's number of 8."""
    base = words.onward(words.pointer(values), words.times(lane.warp, tile.slots * tile.line * tile.lines))
    found = []
    for c in (0, 1):
        slot = words.add(words.times(lane.quarter, 2), c)
        if tile.line == 64:
            piece = words.times(words.differ(words.right(lane.row, 1), lane.quarter), 16)
            piece = words.add(piece, words.times(words.both(lane.row, 1), 8))
        else:
            piece = words.times(words.differ(lane.row, slot), 16)
        found.append(words.onward(words.onward(base, words.times(slot, tile.line)), piece))
    return found
