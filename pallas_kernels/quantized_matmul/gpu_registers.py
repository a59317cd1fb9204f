"""What a warp of the GPU's quantized product does with its registers: codes become floats in place, and are multiplied.

A matrix instruction takes 16 outputs x 16 inputs of the weight and 16 inputs x 8 rows of x, and which of its inputs is
which is nobody's business but that both sides agree. So a thread of the four that share an output reads bytes that lie
together, up to 16 of them, and takes the same inputs of x: no register of the weight ever changes hands.
"""

from typing import Any

from pallas_kernels.quantized_matmul import gpu_words as words
from pallas_kernels.quantized_matmul.gpu_codes import bias, ones, paired, widened
from pallas_kernels.quantized_matmul.gpu_sums import group_sums, scaled
from pallas_kernels.quantized_matmul.gpu_tile import BANKS, CHUNK, LINE, Lane, Tile


def multiply(tile: Tile, sums: list[Any], weight: Any, x: Any, scales: dict[str, Any]) -> list[Any]:
    """Return the sums with a step's products added: `weight`, `x` and the `scales` by name are in shared memory."""
    lane = Lane(tile)
    at_weight, at_x = _at_weight(tile, lane, weight), _at_x(tile, lane, x)
    segment = tile.segment or tile.chunks
    for start in range(0, tile.chunks, segment):
        own = [words.real(0.0)] * tile.own if tile.segment else sums
        for chunk in range(start, start + segment, tile.wide):
            own = _piece(tile, own, at_weight, at_x, chunk)
        if not tile.segment:
            sums = own
            continue
        own = group_sums(tile, own, bias(tile))
        if tile.whole:
            sums = [words.plus(a, b) for a, b in zip(sums, own[: tile.carried], strict=True)]
        else:
            sums = scaled(tile, lane, sums, own, scales, start // tile.group)
    return sums


def _at_weight(tile: Tile, lane: Lane, weight: Any) -> list[Any]:
    """Return where, for each place c of a line, the thread's word lies of a first output's chunk that is static c."""
    begin = words.times(lane.depth, tile.chunks)
    inside = words.times(lane.quarter, tile.wide)  # words of four bytes
    line = words.times(words.right(begin, 3), tile.outputs * LINE)
    base = words.add(words.add(words.times(lane.first, LINE), line), words.times(words.both(inside, 3), 4))
    base = words.onward(words.pointer(weight), base)
    bank = words.differ(words.either(words.both(begin, BANKS - 1), words.right(inside, 2)), lane.row)
    return [words.onward(base, words.times(words.differ(bank, c), CHUNK)) for c in range(BANKS)]


def _at_x(tile: Tile, lane: Lane, x: Any) -> list[Any]:
    """Return where, for each place c, the thread's inputs of its first row of x lie that are static c away."""
    quarter, low = lane.quarter, words.both(lane.quarter, 1)
    if tile.planes == 2:
        inside = {
            4: lambda: words.times(quarter, 4),
            2: lambda: words.add(words.times(words.right(quarter, 1), 4), low),
            1: lambda: words.right(quarter, 1),
        }[tile.wide]()
    else:
        inside = {4: lambda: words.times(quarter, 2), 2: lambda: quarter, 1: lambda: words.right(quarter, 1)}[
            tile.wide
        ]()
    begin = words.add(words.times(lane.depth, tile.chunks * 2 * tile.planes), inside)  # in eights of inputs
    row = words.add(words.times(words.right(begin, 3), tile.rows), lane.row_of_x(tile))
    base = words.times(row, LINE)
    if tile.wide == 1:
        base = words.add(base, words.times(low, 8))
    base = words.onward(words.pointer(x), base)
    bank = words.differ(words.both(begin, BANKS - 1), words.both(row, BANKS - 1))
    return [words.onward(base, words.times(words.differ(bank, c), CHUNK)) for c in range(BANKS)]


def _inputs(tile: Tile, at_x: list[Any], chunk: int, plane: int, pair: int) -> list[list[list[Any]]]:
    """Return, of each eight rows of x, the inputs, paired, that meet each of two words of a thread's of a piece."""
    found = []
    line, place = divmod(chunk * 2 * tile.planes + plane * 2 + pair, BANKS)
    start = line * tile.rows
    for n in range(tile.eights):
        address = words.onward(at_x[place ^ start % BANKS], (start + n * 8) * LINE)
        four = words.several(address, 2 if tile.wide == 1 else 4)
        found.append([paired(tile, *four[i : i + 2]) for i in range(0, len(four), 2)])
    return found


def _piece(tile: Tile, sums: list[Any], at_weight: list[Any], at_x: list[Any], chunk: int) -> list[Any]:
    """Return the sums with the products of some chunks added, as many as a thread's words are wide."""
    sums = list(sums)
    line, place = divmod(chunk, BANKS)
    held = []
    for i in range(tile.strips):
        start = (line * tile.outputs + i * 16) * LINE
        addresses = [words.onward(at_weight[place], start + half * 8 * LINE) for half in (0, 1)]
        held.append([words.several(address, tile.wide) for address in addresses])
    for w in range(tile.wide):
        if w % 2 == 0:
            taken = [_inputs(tile, at_x, chunk, plane, w // 2) for plane in range(tile.planes)]
        strips = [[widened(tile, half[w]) for half in halves] for halves in held]
        for plane in range(tile.planes):
            for n in range(tile.eights):
                right = taken[plane][n][w % 2]
                for i, (top, bottom) in enumerate(strips):
                    left = [top[plane][0], bottom[plane][0], top[plane][1], bottom[plane][1]]
                    at = 4 * (i * tile.eights + n)
                    sums[at : at + 4] = words.product(tile.letters, sums[at : at + 4], left, right)
                if tile.alone:
                    at = tile.sums + 4 * n
                    sums[at : at + 4] = words.product(tile.letters, sums[at : at + 4], [ones(tile)] * 4, right)
    return sums
