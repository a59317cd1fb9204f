"""What a block of the GPU's quantized product multiplies in a step, and which thread of it does what."""

import dataclasses
from typing import Any

from pallas_kernels.quantized_matmul import gpu_words as words

CHUNK = 16  # bytes of an output
LINE = 128  # bytes of an output, or of a row of x, that lie together in shared memory
BANKS = 8  # chunks of a line: of output or row r chunk c lies at c ^ r % 8


@dataclasses.dataclass(frozen=True)
class Form:
    """What codes are, and which floats become of them."""

    qtype: str
    letters: str  # of x's dtype, as PTX names it

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 2 if self.qtype in ("int4", "uint4") else 1

    @property
    def late(self) -> bool:
        """Whether the floats that are made of codes are some constant too large, which is taken away later."""
        return False


@dataclasses.dataclass(frozen=True)
class Tile(Form):
    """What a block multiplies in a step: `lines` of `outputs` against `rows` of x.

    Of its four warps `deep` share outputs, and each takes a part of the step's inputs: x is read once for many outputs.
    """

    outputs: int  # a multiple of 64 / deep
    rows: int  # 1, 2, 4 or a multiple of 8
    lines: int  # 1, 2 or 4
    deep: int  # 1, 2 or 4
    segment: int  # chunks of a warp whose sum is kept apart; 0: all sums run on
    group: int  # chunks of a group
    whole: bool  # there is one group
    offset: bool
    rounded: bool  # x is in steps

    @property
    def strips(self) -> int:
        """Strips of 16 outputs that a warp has."""
        return self.outputs * self.deep // 64

    @property
    def eights(self) -> int:
        """Eights of rows of x."""
        return -(-self.rows // 8)

    @property
    def inputs(self) -> int:
        """Inputs of a step."""
        return self.lines * LINE * self.planes

    @property
    def chunks(self) -> int:
        """Chunks of a step that a warp takes, of each of its outputs."""
        return self.lines * BANKS // self.deep

    @property
    def wide(self) -> int:
        """Words of an output that a thread reads at once: 4, 2 or 1."""
        return next(n for n in (4, 2, 1) if (self.segment or self.chunks) % n == 0)

    @property
    def groups(self) -> int:
        """Groups of a step, or the one that it is of."""
        return 1 if self.whole else max(1, self.lines * BANKS // self.group)

    @property
    def row_of_steps(self) -> int:
        """Steps of x that are copied together, those of the rows first: copies are of whole 128 bytes."""
        return max(self.rows, 32)

    @property
    def late(self) -> bool:
        """Whether codes are multiplied as floats some constant too large: with more rows registers are too few."""
        return self.planes == 2 and self.eights <= 4

    @property
    def alone(self) -> bool:
        """Whether x is also summed alone: for the offset, and for codes that are too large."""
        return self.offset or self.late

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return 4 * self.strips * self.eights

    @property
    def own(self) -> int:
        """Sums of a segment in a thread: of its strips and of x alone."""
        return self.sums + 4 * self.alone * self.eights

    @property
    def carried(self) -> int:
        """Sums of a thread that a step hands to the next."""
        return self.sums + 4 * (self.whole and self.offset) * self.eights


class Lane:
    """Where a thread stands in its block."""

    def __init__(self, tile: Tile):
        index = words.thread()
        warp = words.right(index, 5)
        self.depth = words.both(warp, tile.deep - 1)  # of the warps that share outputs
        self.part = words.right(warp, tile.deep.bit_length() - 1)  # of the outputs
        self.index = words.both(index, 31)
        self.column = words.both(words.right(index, 2), 7)  # its output, of 8, and the column of x that it reads
        self.quarter = words.both(index, 3)
        # Outputs stand in an order in which the wide words of neighbours never meet in a bank of shared memory.
        ends = words.either(words.right(words.both(self.column, 1), -2), words.right(self.column, 2))
        self.row = words.either(ends, words.both(self.column, 2))
        self.first = words.add(words.times(self.part, 16 * tile.strips), self.row)  # of its outputs in the block

    def row_of_x(self, tile: Tile, c: Any = None) -> Any:
        """Return the row of x, of 8, that the thread reads, or that its c-th sum of two is of."""
        if c is None:
            return words.both(self.column, min(tile.rows, 8) - 1)
        return words.add(words.times(self.quarter, 2), c)
