"""The splits of a row as a cluster of blocks: what each has found it sends to the others, and each merges a share.

A block has room in its shared memory for its share of the head of every block's output, and for how much each weighs.
So there is one barrier: before it blocks write to each other, after it each reads its own memory alone, and may end.
"""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention.gpu_lanes import LOG2E, Lane, words_of

SIZES = (2, 4, 8, 16)  # of clusters: no larger ones are to be had, and others leave processors of theirs idle


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The sizes of what the blocks of a cluster merge: outputs `[rows, H]`, of which each has the same `columns`."""

    blocks: int
    columns: int
    width: int  # of the head, in whole tiles: past H there is nothing to be written
    rows: int
    H: int

    @property
    def share(self) -> int:
        """Numbers of the head that a block merges, a multiple of 4."""
        return self.width // self.blocks

    @property
    def floats(self) -> int:
        """Numbers that a block is sent."""
        return self.blocks * self.columns * (self.share + 2)


class Parts:
    """What the blocks send: outputs `[blocks, columns, share]`, and after them peaks and totals `[blocks, columns, 2]`.

    `memory` is the block's own, where all others have theirs, and `block` its number in the cluster.
    """

    def __init__(self, cluster: Cluster, memory: Any, block: Any):
        self.cluster, self.block = cluster, block
        self.values = words.pointer(memory)
        self.weights = words.onward(self.values, 4 * cluster.blocks * cluster.columns * cluster.share)

    def put(self, row: Any, column: Any, values: list[Any]) -> None:
        """Send the output of a row from a column on to the block whose they are: 1, 2 or 4 at a multiple of it."""
        cluster = self.cluster
        to, inside = words.quotient(column, cluster.share), words.remainder(column, cluster.share)
        at = words.add(words.times(words.add(words.times(self.block, cluster.columns), row), cluster.share), inside)
        there = words.of_block(to, words.onward(self.values, words.times(at, 4)))
        words.send_words(there, [words.as_word(value) for value in values])

    def end(self, number: Any, row: Any, *weights: Any) -> None:
        """Send the peak and the total of a row, or of it and the next, to a block: a thread for each number below 16.

        Of fewer blocks each is sent the same by several threads.
        """
        at = words.add(words.times(self.block, self.cluster.columns), row)
        to = words.both(number, self.cluster.blocks - 1)
        there = words.of_block(to, words.onward(self.weights, words.times(at, 8)))
        words.send_words(there, [words.as_word(value) for value in weights])

    def put_matrix(self, acc: list[Any], peak: list[Any], total: list[Any]) -> None:
        """Send `[width, columns]`, and `[columns]`, as the threads hold the products of the matrix units."""
        lane, eights = Lane(), self.cluster.columns // 8
        first, pair = words.add(words.times(lane.warp, 16), lane.row), words.times(lane.quarter, 2)
        number = words.add(words.times(lane.warp, 8), lane.row)
        for i, value in enumerate(acc):
            (strip, rest), (half, c) = divmod(i // 4, eights), divmod(i % 4, 2)
            column = words.add(first, 64 * strip + 8 * half)
            self.put(words.add(pair, 8 * rest + c), column, [value])
        for n in range(eights):
            both = zip(peak[2 * n : 2 * n + 2], total[2 * n : 2 * n + 2], strict=True)
            self.end(number, words.add(pair, 8 * n), *[value for weight in both for value in weight])

    def merge(self, first: Any, out: Any, letters: str, lse: Any) -> None:
        """Write the block's share of the output, `first` being the first of its rows; a block what `lse` refers to."""
        cluster = self.cluster
        pieces, size = cluster.share // 4, words.width(out)
        count = cluster.columns * pieces
        words.meet_cluster(True)
        for begin in range(0, count, 128):
            index = words.add(words.thread(), begin)
            at = words.lesser(index, words.number(count - 1))
            row, piece = words.quotient(at, pieces), words.remainder(at, pieces)
            weights, top, whole = self._weights(row)
            found = self._mixed(at, weights, whole)
            row = words.add(row, first)
            column = words.add(words.times(self.block, cluster.share), words.times(piece, 4))
            wanted = words.both(words.less(index, count), words.less(row, cluster.rows))
            to = words.onward(words.pointer(out), words.times(words.add(words.times(row, cluster.H), column), size))
            written = words_of(found, letters)
            words.write_words(to, written, words.both(wanted, words.less(column, cluster.H)))
            if lse is not None:
                value = words.product(words.plus(top, words.log2(whole)), words.real(1 / LOG2E))
                to = words.onward(words.pointer(lse), words.times(row, 4))
                words.write_words(to, [words.as_word(value)], words.both(wanted, words.less(column, 1)))

    def _weights(self, row: Any) -> tuple[list[Any], Any, Any]:
        """Return what each block's part of a row weighs, relative to the greatest peak, that, and their sum."""
        start = words.onward(self.weights, words.times(row, 8))
        held = [words.several(words.onward(start, 8 * self.cluster.columns * i), 2) for i in range(self.cluster.blocks)]
        held = [(words.as_float(peak), words.as_float(total)) for peak, total in held]
        top, whole, weights = held[0][0], words.real(0.0), []
        for peak, _ in held[1:]:
            top = words.higher(top, peak)
        for peak, total in held:
            weights.append(words.product(total, words.exp2(words.minus(peak, top))))
            whole = words.plus(whole, weights[-1])
        return weights, top, whole

    def _mixed(self, at: Any, weights: list[Any], whole: Any) -> list[Any]:
        """Return the merged output of piece `at` of 4 numbers: 0 where nothing weighs anything."""
        start, found = words.onward(self.values, words.times(at, 16)), [words.real(0.0)] * 4
        for i, weight in enumerate(weights):
            part = words.several(words.onward(start, 4 * self.cluster.columns * self.cluster.share * i), 4)
            found = [words.fma(words.as_float(x), weight, sum_) for x, sum_ in zip(part, found, strict=True)]
        scale = words.select(words.above(whole, 0.0), words.inverse(whole), words.real(0.0))
        return [words.product(value, scale) for value in found]
