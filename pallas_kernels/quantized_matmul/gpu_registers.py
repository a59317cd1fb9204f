"""What a warp of the GPU's quantized product does with its registers: codes become floats in place, and are multiplied.

A matrix instruction takes 16 outputs x 16 inputs of the weight and 16 inputs x 8 rows of x, and which of its inputs is
which is nobody's business but that both sides agree. So a thread of the four that share an output reads four bytes that
lie together, wherever they lie, and takes the same four inputs of x: no register of the weight ever changes hands.
"""

import dataclasses
from typing import Any

from pallas_kernels.quantized_matmul import gpu_words as words

CHUNK = 16  # bytes of an output that four threads share
LINE = 128  # bytes of an output, or of a row of x, that lie together in shared memory
BANKS = 8  # chunks of a line: of output or row r chunk c lies at c ^ r % 8

# By the letters of x's dtype: the bits that make a nibble, of int4 with its sign flipped, a float 128 (1024) or 136
# (1032) too large; one; where the exponent of an fp8 number goes, and the power of two that it then lacks.
FORMS = {
    "bf16": {"int4": 0x4308, "uint4": 0x4300, "one": 0x3F80, "fp8_mask": 0x07F0, "fp8_shift": 4, "fp8_power": 0x7B80},
    "f16": {"int4": 0x6408, "uint4": 0x6400, "one": 0x3C00, "fp8_mask": 0x3F80, "fp8_shift": 1, "fp8_power": 0x5C00},
}
AND_XOR, AND_OR = 0x6A, 0xEA  # tables of (a & b) ^ c and (a & b) | c
TWICE = 0x10001  # the same bits in both halves of a word


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block multiplies in a step: `lines` of `outputs` against `rows` of x."""

    qtype: str
    letters: str  # of x's dtype, as PTX names it
    outputs: int  # a multiple of 64
    rows: int  # a multiple of 8
    lines: int
    segment: int  # chunks whose sum is kept apart; 0: there is one group, and all sums run on
    group: int  # chunks of a group
    offset: bool
    rounded: bool  # x is in steps

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 2 if self.qtype in ("int4", "uint4") else 1

    @property
    def strips(self) -> int:
        """Strips of 16 outputs that a warp has."""
        return self.outputs // 64

    @property
    def eights(self) -> int:
        """Eights of rows of x."""
        return self.rows // 8

    @property
    def inputs(self) -> int:
        """Inputs of a step."""
        return self.lines * LINE * self.planes

    @property
    def groups(self) -> int:
        """Groups of a step, or the one that it is of."""
        return self.lines * BANKS // self.segment if self.segment else 1

    @property
    def row_of_steps(self) -> int:
        """Steps of x that are copied together, those of the rows first: copies are of whole 128 bytes."""
        return max(self.rows, 32)

    @property
    def own(self) -> int:
        """Sums of a segment in a thread: of its strips and, for the offset, of x alone."""
        return 4 * (self.strips + self.offset) * self.eights

    @property
    def carried(self) -> int:
        """Sums of a thread that a step hands to the next."""
        return 4 * self.strips * self.eights if self.segment else self.own


def multiply(tile: Tile, sums: list[Any], weight: Any, x: Any, scales: dict[str, Any]) -> list[Any]:
    """Return the sums with a step's products added: `weight`, `x` and the `scales` by name are in shared memory."""
    lane = Lane()
    at_weight, at_x = _at_weight(tile, lane, weight), _at_x(lane, x)
    chunks = tile.lines * BANKS
    segment = tile.segment or chunks
    for start in range(0, chunks, segment):
        own = [words.real(0.0)] * tile.own if tile.segment else sums
        for chunk in range(start, start + segment):
            own = _chunk(tile, own, at_weight, at_x, chunk)
        sums = scaled(tile, lane, sums, own, scales, start // segment) if tile.segment else own
    return sums


def scaled(tile: Tile, lane: "Lane", sums: list[Any], own: list[Any], scales: dict[str, Any], group: int) -> list[Any]:
    """Return the sums with a group's own added, times its scales: row `group` of each of `scales`."""
    sums = list(sums)
    eights, alone = tile.eights, 4 * tile.strips * tile.eights
    if tile.rounded:
        steps = [[_scale(scales["step"], group, 8 * n, lane.row_of_x(c), tile.row_of_steps) for c in (0, 1)]
                 for n in range(eights)]  # fmt: skip
    for i in range(tile.strips):
        for half in (0, 1):
            row = i * 16 + half * 8
            scale = _scale(scales["scale"], group, row, lane.first(tile), tile.outputs)
            offset = tile.offset and _scale(scales["offset"], group, row, lane.first(tile), tile.outputs)
            for n in range(eights):
                for c in (0, 1):
                    at = 4 * (i * eights + n) + 2 * half + c
                    into = words.real(0.0) if tile.rounded else sums[at]
                    found = words.fma(own[at], scale, into)
                    if tile.offset:
                        found = words.fma(own[alone + 4 * n + c], offset, found)
                    sums[at] = words.fma(found, steps[n][c], sums[at]) if tile.rounded else found
    return sums


def store(tile: Tile, sums: list[Any], out: Any, row: Any, output: Any, shape: tuple[int, int]) -> None:
    """Write the sums to `out`, which has rows of `shape` = (rows, outputs), from `row` and `output` on."""
    lane = Lane()
    for at, value in enumerate(sums):
        strip, rest = divmod(at, 4 * tile.eights)
        column = words.add(words.add(output, lane.first(tile)), strip * 16 + rest // 2 % 2 * 8)
        at_row = words.add(lane.row_of_x(rest % 2), rest // 4 * 8)
        _write(tile, out, row, at_row, column, value, shape, words.number(1))


def leave(sums: list[Any], shared: Any) -> None:
    """Keep a block's sums where the others of its cluster find them."""
    base = words.onward(words.pointer(shared), words.times(words.thread(), 4))
    for at, value in enumerate(sums):
        words.keep(words.onward(base, 4 * 128 * at), value)


def gather(tile: Tile, blocks: int, block: Any, shared: Any, out: Any, output: Any, shape: tuple[int, int]) -> None:
    """Add up what the blocks of a cluster have left, and write the share of the block of that number: see `store`."""
    lane = Lane()
    count = 4 * tile.strips * tile.eights
    base = words.onward(words.pointer(shared), words.times(words.thread(), 4))
    for first in range(0, count, blocks):
        at = words.add(block, first)
        address = words.onward(base, words.times(at, 4 * 128))
        value = words.kept_by(0, address)
        for other in range(1, blocks):
            value = words.plus(value, words.kept_by(other, address))
        strip, rest = words.quotient(at, 4 * tile.eights), words.remainder(at, 4 * tile.eights)
        column = words.add(words.add(output, lane.first(tile)), words.times(strip, 16))
        column = words.add(column, words.times(words.both(words.right(rest, 1), 1), 8))
        odd = words.both(rest, 1)
        at_row = words.add(lane.row_of_x(odd), words.times(words.right(rest, 2), 8))
        _write(tile, out, words.number(0), at_row, column, value, shape, words.less(at, count))


def _write(
    tile: Tile, out: Any, row: Any, at: Any, column: Any, value: Any, shape: tuple[int, int], wanted: Any
) -> None:
    """Write a sum of row `at` of x, unless it is none of `shape`, to `row` + `at` and `column` of `out`."""
    rows, outputs = shape
    wanted = words.both(wanted, words.both(words.less(column, outputs), words.less(at, rows)))
    entry = words.add(words.times(words.add(row, at), outputs), column)
    size = words.width(out)
    words.write(words.onward(words.pointer(out), words.times(entry, size)), value, size, tile.letters, wanted)


class Lane:
    """Where a thread stands in its warpgroup."""

    def __init__(self):
        index = words.thread()
        self.warp = words.right(index, 5)
        self.column = words.both(words.right(index, 2), 7)  # its output, of 8, and the column of x that it reads
        self.quarter = words.both(index, 3)

    def first(self, tile: Tile) -> Any:
        """Return the first of the thread's outputs in the block."""
        return words.add(words.times(self.warp, 16 * tile.strips), self.column)

    def row_of_x(self, c: Any = None) -> Any:
        """Return the row of x, of 8, that the thread reads, or that its c-th sum of two is of.

        Rows stand in an order in which those of four neighbours never meet in a bank of shared memory.
        """
        column = self.column if c is None else words.add(words.times(self.quarter, 2), c)
        return words.either(words.right(words.both(column, 3), -1), words.right(column, 2))


def _at_weight(tile: Tile, lane: Lane, weight: Any) -> list[Any]:
    """Return where the thread's word of each chunk of its first output lies."""
    base = words.add(words.times(lane.first(tile), LINE), words.times(lane.quarter, 4))
    base = words.onward(words.pointer(weight), base)
    return [words.onward(base, words.times(words.differ(lane.column, c), CHUNK)) for c in range(BANKS)]


def _at_x(lane: Lane, x: Any) -> list[Any]:
    """Return where the thread's four inputs of each 16 of a line of its first row of x lie."""
    row = lane.row_of_x()
    base = words.add(words.times(row, LINE), words.times(words.both(lane.quarter, 1), 8))
    base = words.onward(words.pointer(x), base)
    own = words.differ(row, words.right(lane.quarter, 1))
    return [words.onward(base, words.times(words.differ(own, 2 * b), CHUNK)) for b in range(4)]


def _chunk(tile: Tile, sums: list[Any], at_weight: list[Any], at_x: list[Any], chunk: int) -> list[Any]:
    """Return the sums with the products of a chunk added."""
    sums = list(sums)
    line, bank = divmod(chunk, BANKS)
    strips = []
    for i in range(tile.strips):
        start = (line * tile.outputs + i * 16) * LINE
        halves = [words.word(words.onward(at_weight[bank], start + half * 8 * LINE)) for half in (0, 1)]
        strips.append([_widened(tile, codes) for codes in halves])
    for plane in range(tile.planes):
        sixteen = chunk * tile.planes + plane
        for n in range(tile.eights):
            start = (sixteen // 4 * tile.rows + n * 8) * LINE
            low, high = words.two_words(words.onward(at_x[sixteen % 4], start))
            right = [words.picked(low, high, 0x5410), words.picked(low, high, 0x7632)]
            for i, (top, bottom) in enumerate(strips):
                left = [top[plane][0], bottom[plane][0], top[plane][1], bottom[plane][1]]
                at = 4 * (i * tile.eights + n)
                sums[at : at + 4] = words.product(tile.letters, sums[at : at + 4], left, right)
            if tile.offset:
                ones = [words.number(FORMS[tile.letters]["one"] * TWICE)] * 4
                at = 4 * (tile.strips * tile.eights + n)
                sums[at : at + 4] = words.product(tile.letters, sums[at : at + 4], ones, right)
    return sums


def _widened(tile: Tile, codes: Any) -> list[tuple[Any, Any]]:
    """Return of each plane of four bytes the codes of bytes 0 and 2, and those of 1 and 3, as pairs of floats."""
    if tile.planes == 2:
        bits = FORMS[tile.letters][tile.qtype] * TWICE
        pairs = [words.chosen(words.right(codes, s), 0x000F000F, bits, AND_XOR) for s in (0, 8, 4, 12)]
        pairs = [words.pairwise("sub", tile.letters, pair, bits) for pair in pairs]
        return [(pairs[0], pairs[1]), (pairs[2], pairs[3])]
    if tile.qtype == "int8":
        return [(_int8_pair(tile, codes), _int8_pair(tile, words.right(codes, 8)))]
    return [(_fp8_pair(tile, words.right(codes, -8)), _fp8_pair(tile, codes))]


def _int8_pair(tile: Tile, codes: Any) -> Any:
    """Return the int8 numbers of bytes 0 and 2 as floats."""
    if tile.letters == "f16":
        bits = 0x6480 * TWICE  # 1024, and the sign flipped: 128 too
        return words.pairwise("sub", tile.letters, words.chosen(codes, 0x00FF00FF, bits, AND_XOR), bits)
    # Eight bits don't fit the mantissa: 128 and the low seven, less 128 or, of a negative number, 256.
    low = words.chosen(codes, 0x007F007F, 0x4300 * TWICE, AND_OR)
    sign = words.chosen(codes, 0x00800080, 0x4300 * TWICE, AND_OR)
    return words.pairwise("sub", tile.letters, low, sign)


def _fp8_pair(tile: Tile, codes: Any) -> Any:
    """Return the float8_e4m3fn numbers of bytes 1 and 3 as floats; a product makes their exponents right, exactly."""
    form = FORMS[tile.letters]
    sign = words.both(codes, 0x8000 * TWICE)
    bits = words.chosen(words.right(codes, form["fp8_shift"]), form["fp8_mask"] * TWICE, sign, AND_OR)
    return words.pairwise("mul", tile.letters, bits, form["fp8_power"] * TWICE)


def _scale(ref: Any, group: int, start: int, index: Any, width: int) -> Any:
    """Return entry `start + index` of row `group` of what has `width` entries a row."""
    size = words.width(ref)
    base = words.onward(words.pointer(ref), words.times(index, size))
    return words.read(words.onward(base, (group * width + start) * size), size)
