"""What the four warps of a block found in their slots, made one, and written: see `gpu_warp`."""

from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention.gpu_lanes import LEAST, LOG2E, Lane, Tile, words_of

WARPS = 4


class Output:
    """The output `[rows, H]` of a block that is alone, in memory, and what `lse` refers to `[8]` unless it is None."""

    def __init__(self, tile: Tile, out: Any, letters: str, lse: Any):
        self._rows, self._size, self._letters = tile.rows, words.width(out), letters
        self._row = tile.line * tile.lines * self._size
        self._out, self._lse = words.pointer(out), None if lse is None else words.pointer(lse)

    def put(self, row: Any, column: Any, values: list[Any]) -> None:
        """Write four numbers of a row, from a column on."""
        to = words.onward(words.onward(self._out, words.times(row, self._row)), words.times(column, self._size))
        words.write_words(to, words_of(values, self._letters), words.less(row, self._rows))

    def end(self, number: Any, row: Any, peak: Any, total: Any) -> None:
        """Write the log-sum-exp of a row, if `number` is 0."""
        if self._lse is None:
            return
        value = words.product(words.plus(peak, words.log2(total)), words.real(1 / LOG2E))
        words.write_words(words.onward(self._lse, words.times(row, 4)), [words.as_word(value)], words.less(number, 1))


def finish(tile: Tile, sums: list[Any], shared: Any, peaks: Any, out: Any) -> None:
    """Put the output to `out`, four numbers a time, and for each row its peak and total: `Output`, or as that.

    `shared` and `peaks` are shared memory that nothing is copied to any more, `128 H` and 256 bytes of it.
    """
    lane = Lane()
    *acc, peak, total = sums
    for distance in (1, 2):
        total = words.plus(total, words.neighbour(total, distance))
    base = words.pointer(peaks)
    words.meet()  # what shared memory held has been read
    at = words.add(words.times(lane.warp, 64), words.times(lane.row, 8))
    words.keep_words(words.onward(base, at), [words.as_word(peak), words.as_word(total)])
    words.meet()
    held = [words.several(words.onward(base, words.add(words.times(lane.row, 8), 64 * w)), 2) for w in range(WARPS)]
    held = [(words.as_float(a), words.as_float(b)) for a, b in held]
    top, whole = words.real(LEAST), words.real(0.0)
    for value, _ in held:
        top = words.higher(top, value)
    for value, part in held:
        whole = words.fma(part, words.exp2(words.minus(value, top)), whole)
    share = words.product(words.exp2(words.minus(peak, top)), words.inverse(whole))
    share = words.select(words.above(whole, 0.0), share, words.real(0.0))
    chunks = len(acc) // 4
    own = words.onward(words.pointer(shared), words.times(lane.index, 16))
    mine = words.onward(own, words.times(lane.warp, chunks * 512))
    for i in range(chunks):
        part = [words.as_word(words.product(value, share)) for value in acc[4 * i : 4 * i + 4]]
        words.keep_words(words.onward(mine, 512 * i), part)
    words.meet()
    each = chunks // WARPS
    for i in range(each):
        chunk = words.add(words.times(lane.warp, each), i)
        address = words.onward(own, words.times(chunk, 512))
        found = [words.as_float(word) for word in words.several(address, 4)]
        for w in range(1, WARPS):
            other = words.several(words.onward(address, w * chunks * 512), 4)
            found = [words.plus(a, words.as_float(b)) for a, b in zip(found, other, strict=True)]
        line, piece = words.quotient(chunk, tile.line // 16), words.remainder(chunk, tile.line // 16)
        column = words.add(words.times(line, tile.line), words.times(lane.quarter, tile.line // 4))
        column = words.add(column, words.times(piece, 4))
        out.put(lane.row, column, found)
    out.end(words.add(words.times(lane.warp, WARPS), lane.quarter), lane.row, top, whole)
