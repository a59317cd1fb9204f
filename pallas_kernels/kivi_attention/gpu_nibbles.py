"""What a thread does to attend to packed groups, whose codes are multiplied as they are: see `gpu_warp`.

A warp takes rows of bytes of its own, and with them both tokens of each byte. A group's scales multiply the queries,
once for each group, and its offsets make one number of them; a token's scales multiply the weights, and its offsets
add up to a number for each run of channels, which is added to all of that run at the end. So the codes 0..15 meet
integers of 16 bits, as int8 codes do. Eight columns of a product are of one run: of a run a thread reads the piece of
its row's number of 8, which is 4, 8 or 16 bytes long.
"""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention import gpu_merge_warps
from pallas_kernels.decode_attention.gpu_lanes import Lane, Tile, at_keys, over_four, two_floats
from pallas_kernels.decode_attention.gpu_operands import Integers, nibbles
from pallas_kernels.decode_attention.gpu_plan import Plan
from pallas_kernels.decode_attention.gpu_warp import fitted, limits, of_seen, query_words, sizes, weigh

BESIDE = ("scale", "offset")  # what comes with codes


@dataclasses.dataclass(frozen=True)
class Nibbles(Tile):
    """The sizes of a warp's work; its `slots` are rows of bytes."""

    group: int  # tokens
    runs: int  # of a value's channels
    part: int  # tokens whose grids of values lie together

    @property
    def sums(self) -> int:
        """Numbers of a thread from block to block: the output's, what its offsets add up to, the peak, the total."""
        return self.own + self.runs + 2

    @property
    def queries(self) -> int:
        """Words of the queries in a thread: two numbers each."""
        return self.own // 2

    @property
    def fixed(self) -> int:
        """Words of a thread that stay: the queries, and what its row sees."""
        return self.queries + 4

    @property
    def scores(self) -> int:
        """Scores of a thread in a block."""
        return self.slots // 2

    @property
    def piece(self) -> int:
        """Bytes of a value that a thread reads at a time: eight threads' are of one run, and of one line."""
        run = self.line * self.lines // self.runs
        return next(size for size in (16, 8, 4) if self.line % (8 * size) == 0 and run % (8 * size) == 0)

    def eights(self) -> list[tuple[int, int]]:
        """Return each eight rows of bytes for their first tokens, then each for their second: (eight, half)."""
        return [(eight, half) for half in (0, 1) for eight in range(self.slots // 8)]

    def apart(self, eight: int, half: int) -> int:
        """Return how many tokens the first of an eight of rows is past the warp's first one."""
        rows = self.group // 2
        group, row = divmod(8 * eight, rows) if rows <= self.slots else (0, 8 * eight)
        return group * self.group + row + half * rows

    def first(self, lane: Lane) -> Any:
        """Return the warp's first token in the block."""
        row = words.times(lane.warp, self.slots)
        group, inside = words.quotient(row, self.group // 2), words.remainder(row, self.group // 2)
        return words.add(words.times(group, self.group), inside)


def tile_of(plan: Plan) -> Nibbles:
    """Return the sizes of a warp's work."""
    groups = plan.groups
    return Nibbles(
        **sizes(plan), slots=plan.slots // 8, operands=Integers, group=groups.size, runs=groups.runs,
        part=min(groups.together, plan.slots),
    )  # fmt: skip


def prepare(tile: Nibbles, q: Any, tree: Any, start: Any, length: Any, position: Any, first: Any) -> list[Any]:
    """Return the words of a thread that stay: `q` is `[rows, H]` in bfloat16, `first` the number of its first row."""
    lane = Lane()
    return [*query_words(tile, lane, q), *limits(tile, lane, tree, start, length, position, first)]


def scores(tile: Nibbles, fixed: list[Any], keys: Any, scales: Any, offsets: Any, base: Any, start: Any) -> list[Any]:
    """Return the thread's scores of its warp's share of a block, to base 2, `NOTHING` where its row sees nothing."""
    lane = Lane()
    at, first = at_keys(tile, lane, keys), words.add(words.add(base, tile.first(lane)), words.times(lane.quarter, 2))
    grids = [words.onward(words.pointer(x), words.times(lane.quarter, tile.line // 4 * words.width(x)))
             for x in (scales, offsets)]  # fmt: skip
    found = {}
    for eight in range(tile.slots // 8):
        if 8 * eight % (tile.group // 2) == 0:
            row = words.add(words.times(lane.warp, tile.slots), 8 * eight)
            group = words.quotient(row, tile.group // 2)
            queries, step, shift = _scaled(tile, fixed[: tile.queries], grids, group, words.width(scales))
        held = [
            word
            for line in range(tile.lines)
            for address in at
            for word in words.several(words.onward(address, (eight * tile.lines + line) * 8 * tile.line), 4)
        ]
        for half in (0, 1):
            products = tile.operands.scores(queries, [nibbles(word, half) for word in held])
            for c in (0, 1):
                slot = words.add(first, tile.apart(eight, half) + c)
                value = words.fma(products[c], step, shift)
                found[eight, half, c] = of_seen(tile, fixed[tile.queries :], value, slot, start)
    return [found[eight, half, c] for eight, half in tile.eights() for c in (0, 1)]


def _scaled(tile: Nibbles, held: list[Any], grids: list[Any], group: Any, size: int) -> tuple[list[Any], Any, Any]:
    """Return the thread's queries for a group, what their products are times, and what is added to these."""
    queries = [value for word in held for value in two_floats(word)]
    from_group = words.times(group, tile.line * tile.lines * size)
    scales, offsets = (
        [
            value
            for line in range(tile.lines)
            for value in _floats(words.onward(grid, line * tile.line * size), tile.line // 4, size)
        ]
        for grid in (words.onward(grid, from_group) for grid in grids)
    )
    scaled = [words.product(q, s) for q, s in zip(queries, scales, strict=True)]
    shift = _sum([(q, o) for q, o in zip(queries, offsets, strict=True)])
    into, step = fitted(tile, over_four(words.higher, _highest(scaled)))
    factor = words.real(tile.factor)
    shift = words.product(over_four(words.plus, shift), factor)
    return tile.operands.queries(scaled, into), words.product(step, factor), shift


def _floats(address: Any, count: int, size: int) -> list[Any]:
    """Return `count` numbers from an address of whole 16 bytes, of 4 bytes each or bfloat16."""
    found = []
    for at in range(0, count * size, 16):
        for word in words.several(words.onward(address, at), 4):
            found += two_floats(word) if size == 2 else [words.as_float(word)]
    return found


def _highest(values: list[Any]) -> Any:
    """Return the greatest magnitude: by pairs, as a chain of all would be waited for."""
    values = [words.magnitude(value) for value in values]
    while len(values) > 1:
        rest = values[len(values) // 2 * 2 :]
        values = [words.higher(a, b) for a, b in zip(values[::2], values[1::2], strict=False)] + rest
    return values[0]


def _sum(pairs: list[tuple[Any, Any]]) -> Any:
    """Return the sum of products, in two chains."""
    chains = [words.product(*pairs[0]), words.product(*pairs[1])]
    for i, (a, b) in enumerate(pairs[2:]):
        chains[i % 2] = words.fma(a, b, chains[i % 2])
    return words.plus(*chains)


def mix(
    tile: Nibbles, sums: list[Any], found: list[Any], values: Any, scales: Any, offsets: Any, base: Any, alive: Any
) -> list[Any]:
    """Return a thread's sums with its warp's share of a block; `alive`: the first slot that is, and how many are."""
    lane = Lane()
    acc, shifts = sums[: tile.own], sums[tile.own : -2]
    weights, peak, total, shrink, grow = weigh(found, *sums[-2:])
    size, first = words.width(scales), tile.first(lane)
    token = words.add(first, words.times(lane.quarter, 2))
    part = words.times(words.quotient(token, tile.part), tile.runs * tile.part)
    own = words.times(words.add(part, words.remainder(token, tile.part)), size)
    grids = [words.onward(words.pointer(x), own) for x in (scales, offsets)]
    ahead = words.take(words.add(base, first), alive[0])
    live = {}
    for eight in range(tile.slots // 8):  # a group is alive or not, all of it
        group = tile.apart(eight, 0) // tile.group
        live[eight] = live[eight - 1] if eight and group == tile.apart(eight - 1, 0) // tile.group else (
            words.below(words.add(ahead, group * tile.group), alive[1])
        )  # fmt: skip
    at, each = _at_values(tile, lane, values), tile.piece
    for run in range(tile.runs):
        factors, steps = ([] for _ in range(2))
        for eight, half in tile.eights():
            over, inside = divmod(tile.apart(eight, half), tile.part)
            to = ((over * tile.runs + run) * tile.part + inside) * size
            factors += _alive(words.onward(grids[0], to), size, live[eight])
            steps += _alive(words.onward(grids[1], to), size, live[eight])
        scaled = [words.product(w, x) for w, x in zip(weights, factors, strict=True)]
        into, step = fitted(tile, over_four(words.higher, _highest(scaled)))
        left, back = tile.operands.lefts(scaled, into), words.product(grow, step)
        shift = _sum([(w, x) for w, x in zip(weights, steps, strict=True)])
        shifts[run] = words.fma(shift, grow, words.product(shifts[run], shrink))
        pieces = tile.line * tile.lines // (8 * each)
        for piece in range(run * pieces // tile.runs, (run + 1) * pieces // tile.runs):
            for i, two in _columns(tile, left, at, piece):
                for c in (0, 1):
                    place = (2 * piece + c) * each + i
                    acc[place] = words.fma(two[c], back, words.product(acc[place], shrink))
    return [*acc, *shifts, peak, total]


def _alive(address: Any, size: int, live: Any) -> tuple[Any, Any]:
    """Return the two numbers at an address, or zeros where nothing is alive: what nothing wrote may be NaN."""
    held = [words.select(live, word, words.number(0)) for word in words.several(address, size // 2)]
    return two_floats(held[0]) if size == 2 else tuple(words.as_float(word) for word in held)


def _at_values(tile: Nibbles, lane: Lane, values: Any) -> list[tuple[Any, Any, Any]]:
    """Return for the thread's first two rows where they begin, and its piece of 16 bytes there and the byte in it."""
    base = words.onward(words.pointer(values), words.times(lane.warp, tile.slots * tile.line * tile.lines))
    byte = words.times(lane.row, tile.piece)
    found = []
    for c in (0, 1):
        row = words.add(words.times(lane.quarter, 2), c)
        turned = words.differ(words.right(byte, 4), row if tile.line == 128 else words.right(row, 1))
        found.append((words.onward(base, words.times(row, tile.line)), words.times(turned, 16), words.both(byte, 15)))
    return found


def _columns(tile: Nibbles, left: list[Any], at: list[tuple[Any, Any, Any]], piece: int) -> Any:
    """Yield for each byte of a thread's piece the sums of its two columns."""
    line, start = divmod(8 * tile.piece * piece, tile.line)
    count, eights = tile.piece // 4, tile.slots // 8
    held = []  # of each row of bytes of the thread its words
    for row, turned, byte in at:
        address = words.onward(row, words.add(words.differ(turned, start), byte))
        held.append(
            [words.several(words.onward(address, (i * tile.lines + line) * 8 * tile.line), count)
             for i in range(eights)]
        )  # fmt: skip
    for word in range(count):
        rows = [held[c][i][word] for i in range(eights) for c in (0, 1)]
        for byte, rights in enumerate(tile.operands.halved_columns(rows)):
            yield 4 * word + byte, tile.operands.multiply(left, rights)


def finish(tile: Nibbles, sums: list[Any], shared: Any, peaks: Any, out: Any) -> None:
    """Do what `gpu_merge_warps.finish` does: offsets are added first, over the four threads of a row."""
    acc, each = list(sums[: tile.own]), tile.piece
    pieces = tile.line * tile.lines // (8 * each)
    shifts = [over_four(words.plus, shift) for shift in sums[tile.own : -2]]
    for i in range(tile.own):
        acc[i] = words.plus(acc[i], shifts[i // (2 * each) * tile.runs // pieces])
    kept = {f.name: getattr(tile, f.name) for f in dataclasses.fields(Tile)}
    written = Tile(**kept | {"line": 8 * each, "lines": pieces})
    gpu_merge_warps.finish(written, [*acc, *sums[-2:]], shared, peaks, out)
