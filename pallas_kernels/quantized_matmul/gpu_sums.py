"""What becomes of the sums of a thread of the GPU's quantized product: scaled, added up, and written."""

from typing import Any

from pallas_kernels.quantized_matmul import gpu_words as words
from pallas_kernels.quantized_matmul.gpu_tile import Lane, Tile


def group_sums(tile: Tile, own: list[Any], bias: int) -> list[Any]:
    """Return sums of a segment with what its codes were too large taken away: that times the sum of x alone."""
    if not bias:
        return own
    found, less = list(own), words.real(-float(bias))
    for at in range(tile.sums):
        alone = own[tile.sums + at // 4 % tile.eights * 4 + at % 2]
        found[at] = words.fma(alone, less, own[at])
    return found


def scaled(tile: Tile, lane: Lane, sums: list[Any], own: list[Any], scales: dict[str, Any], group: int) -> list[Any]:
    """Return the sums with a group's own added, times its scales: it is the warp's group of that number in the step."""
    sums = list(sums)
    eights = tile.eights
    ahead = None if tile.whole else words.quotient(words.times(lane.depth, tile.chunks), tile.group)
    at = {name: _row(ref, ahead, tile.row_of_steps if name == "step" else tile.outputs) for name, ref in scales.items()}

    def entry(name: str, start: int, index: Any) -> Any:
        size = words.width(scales[name])
        start += group * (tile.row_of_steps if name == "step" else tile.outputs)
        return words.read(words.onward(words.onward(at[name], words.times(index, size)), start * size), size)

    if tile.rounded:
        steps = [[entry("step", 8 * n, lane.row_of_x(tile, c)) for c in (0, 1)] for n in range(eights)]
    for i in range(tile.strips):
        for half in (0, 1):
            scale = entry("scale", i * 16 + half * 8, lane.first)
            offset = tile.offset and entry("offset", i * 16 + half * 8, lane.first)
            for n in range(eights):
                for c in (0, 1):
                    place = 4 * (i * eights + n) + 2 * half + c
                    into = words.real(0.0) if tile.rounded else sums[place]
                    found = words.fma(own[place], scale, into)
                    if tile.offset:
                        found = words.fma(own[tile.sums + 4 * n + c], offset, found)
                    sums[place] = words.fma(found, steps[n][c], sums[place]) if tile.rounded else found
    return sums


def _row(ref: Any, ahead: Any, width: int) -> Any:
    """Return where row `ahead` begins of what has `width` entries a row."""
    base = words.pointer(ref)
    return base if ahead is None else words.onward(base, words.times(ahead, width * words.width(ref)))


def store(tile: Tile, sums: list[Any], out: Any, row: Any, output: Any, shape: tuple[int, int]) -> None:
    """Write the sums to `out`, which has rows of `shape` = (rows, outputs), from `row` and `output` on."""
    lane = Lane(tile)
    for at, value in enumerate(sums):
        strip, rest = divmod(at, 4 * tile.eights)
        column = words.add(words.add(output, lane.first), strip * 16 + rest // 2 % 2 * 8)
        at_row = words.add(lane.row_of_x(tile, rest % 2), rest // 4 * 8)
        _write(tile, out, row, at_row, column, value, shape, words.number(1))


def left_by(tile: Tile, blocks: int) -> int:
    """Return the floats that a block of a cluster of some leaves to be added up, and some that nobody reads."""
    share = tile.deep * blocks
    return 32 * (3 * tile.sums + -(-tile.sums // share) * share) if share > 1 else 0


def leave(tile: Tile, sums: list[Any], shared: Any) -> None:
    """Keep a thread's sums where the others find them that have a part of the same outputs."""
    del tile
    index = words.thread()
    start = words.add(words.times(words.right(index, 5), 32 * len(sums)), words.both(index, 31))
    base = words.onward(words.pointer(shared), words.times(start, 4))
    for at, value in enumerate(sums):
        words.keep(words.onward(base, 4 * 32 * at), value)


def gather(
    tile: Tile, blocks: int, block: Any, shared: Any, out: Any, row: Any, output: Any, shape: tuple[int, int]
) -> None:
    """Add up what the warps of a block have left, and those of its cluster of `blocks`, each a share: see `store`.

    `block` is the block's number in its cluster.
    """
    lane = Lane(tile)
    count, share = tile.sums, tile.deep * blocks
    mine = words.add(words.times(block, tile.deep), lane.depth) if blocks > 1 else lane.depth
    start = words.add(words.times(lane.part, 32 * tile.deep * count), lane.index)
    base = words.onward(words.pointer(shared), words.times(start, 4))
    for first in range(0, count, share):
        at = words.add(mine, first)
        address = words.onward(base, words.times(at, 4 * 32))
        value = None
        for other in range(blocks):
            for depth in range(tile.deep):
                there = words.onward(address, depth * count * 32 * 4)
                found = words.kept_by(other, there) if blocks > 1 else words.read(there, 4)
                value = found if value is None else words.plus(value, found)
        strip, rest = words.quotient(at, 4 * tile.eights), words.remainder(at, 4 * tile.eights)
        column = words.add(words.add(output, lane.first), words.times(strip, 16))
        column = words.add(column, words.times(words.both(words.right(rest, 1), 1), 8))
        at_row = words.add(lane.row_of_x(tile, words.both(rest, 1)), words.times(words.right(rest, 2), 8))
        _write(tile, out, row, at_row, column, value, shape, words.less(at, count))


def _write(
    tile: Tile, out: Any, row: Any, at: Any, column: Any, value: Any, shape: tuple[int, int], wanted: Any
) -> None:
    """Write a sum of row `at` of x, unless it is none of `shape`, to `row` + `at` and `column` of `out`."""
    rows, outputs = shape
    wanted = words.both(wanted, words.both(words.less(column, outputs), words.less(at, rows)))
    entry = words.add(words.times(words.add(row, at), outputs), column)
    size = words.width(out)
    words.write(words.onward(words.pointer(out), words.times(entry, size)), value, size, tile.letters, wanted)
