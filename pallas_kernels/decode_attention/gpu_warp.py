"""What a thread does to attend to codes that are multiplied as they are, or nearly: see `gpu_operands`.

A warp takes slots of its own, a multiple of 32, and no other warp's numbers until the end. Of its 32 threads four
share a query row, of 8; a row of queries, or of weights, is 16 bits a number in two bytes, which are two rows of the
matrix units' 16. A thread's weights are of slots 8 n + 2 t and the next, t being its number of the four: which of a
product's inputs is which is nobody's business but that both sides agree, so what a thread found of the scores is what
it multiplies the values by, and it reads whole 16 bytes of keys and values, wherever they lie.

Weights are relative to the greatest of the warp's block, not of the row: bits are not lost beside a slot far ahead.
"""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention.gpu_lanes import (
    LEAST,
    LOG2E,
    NOTHING,
    Lane,
    Tile,
    at_keys,
    at_scales,
    at_values,
    over_four,
    two_floats,
    two_scales,
)
from pallas_kernels.decode_attention.gpu_merge_warps import finish as finish
from pallas_kernels.decode_attention.gpu_operands import Halves, Integers
from pallas_kernels.decode_attention.gpu_plan import Plan, swizzle

BESIDE = ("scale",)  # what comes with codes


def tile_of(plan: Plan) -> Tile:
    """Return the sizes of a warp's work."""
    return Tile(**sizes(plan), slots=plan.slots // 4, operands=Integers if plan.stored == jnp.int8 else Halves)


def sizes(plan: Plan) -> dict[str, Any]:
    """Return those that any codes have."""
    line = swizzle(plan.H, plan.stored)
    factor = plan.scale * LOG2E if plan.softcap is None else plan.scale / plan.softcap
    return dict(
        line=line, lines=plan.H // line, rows=min(plan.rows, plan.columns), tokens=plan.tokens, factor=factor,
        softcap=plan.softcap, window=plan.window, sinks=plan.sinks, tree_words=plan.tree_words,
    )  # fmt: skip


def prepare(tile: Tile, q: Any, tree: Any, start: Any, length: Any, position: Any, first: Any) -> list[Any]:
    """Return the words of a thread that stay: `q` is `[rows, H]` in bfloat16, `tree` a row's words or None.

    `first` is the number of the first of these rows.
    """
    lane = Lane()
    values = [value for word in query_words(tile, lane, q) for value in two_floats(word)]
    peak = words.real(0.0)
    for value in values:
        peak = words.higher(peak, words.magnitude(value))
    into, step = fitted(tile, over_four(words.higher, peak))
    queries = tile.operands.queries(values, into)
    return [*queries, words.as_word(words.product(step, words.real(tile.factor))),
            *limits(tile, lane, tree, start, length, position, first)]  # fmt: skip


def query_words(tile: Tile, lane: Lane, q: Any) -> list[Any]:
    """Return the words of the thread's part of its row of queries, two numbers each: a quarter of each line."""
    row = words.lesser(lane.row, words.number(tile.rows - 1))
    base = words.onward(words.pointer(q), words.times(row, 2 * tile.line * tile.lines))
    base = words.onward(base, words.times(lane.quarter, tile.line // 2))
    return [
        word
        for line in range(tile.lines)
        for at in range(0, tile.line // 2, 16)
        for word in words.several(words.onward(base, 2 * tile.line * line + at), 4)
    ]


def limits(tile: Tile, lane: Lane, tree: Any, start: Any, length: Any, position: Any, first: Any) -> list[Any]:
    """Return the first slot that the thread's row sees and their number, those of the sinks, and the tree's words."""
    if tile.tree_words:
        base = words.onward(words.pointer(tree), words.times(lane.row, 4))
        found = [words.as_word(words.read(words.onward(base, 32 * i), 4)) for i in range(tile.tree_words + 1)]
        at, end = words.add(words.add(length, -tile.tokens), found.pop()), length
    else:
        found = []
        token = words.remainder(words.add(lane.row, first), tile.tokens) if tile.tokens > 1 else 0
        at = words.add(position, token)
        end = words.lesser(length, words.add(at, 1))
    lowest = start if tile.window is None else words.greater(start, words.add(at, 1 - tile.window))
    sinks = words.lesser(end, words.number(tile.sinks))
    return [lowest, _count(lowest, end), _count(start, sinks), words.add(length, -tile.tokens), *found]


def _count(first: Any, end: Any) -> Any:
    return words.greater(words.take(end, first), words.number(0))


def scores(tile: Tile, fixed: list[Any], keys: Any, scales: Any, base: Any, start: Any) -> list[Any]:
    """Return the thread's scores of its warp's share of a block, to base 2, `NOTHING` where its row sees nothing."""
    lane = Lane()
    factor = words.as_float(fixed[tile.queries])
    at, first_scales = at_keys(tile, lane, keys), at_scales(tile, lane, scales)
    first = words.add(words.add(base, words.times(lane.warp, tile.slots)), words.times(lane.quarter, 2))
    found = []
    for eight in range(tile.slots // 8):
        held = []
        for line in range(tile.lines):
            for address in at:
                held += words.several(words.onward(address, (eight * tile.lines + line) * 8 * tile.line), 4)
        products = tile.operands.scores(fixed[: tile.queries], held)
        steps = two_scales(words.onward(first_scales, eight * 8 * words.width(scales)), words.width(scales))
        for c in (0, 1):
            value = words.product(products[c], words.product(steps[c], factor))
            slot = words.add(first, 8 * eight + c)
            found.append(of_seen(tile, fixed[tile.queries + 1 :], value, slot, start))
    return found


def of_seen(tile: Tile, limits: list[Any], value: Any, slot: Any, start: Any) -> Any:
    """Return a score, capped, if the thread's row sees its slot, or else `NOTHING`."""
    if tile.softcap is not None:
        value = _capped(tile, value)
    return words.select(_seen(tile, limits, slot, start), value, words.real(NOTHING))


def _capped(tile: Tile, value: Any) -> Any:
    """Return the capped score: tanh by the exponential, the hardware's own has three digits."""
    power = words.exp2(words.product(value, words.real(2 * LOG2E)))
    part = words.inverse(words.plus(power, words.real(1.0)))
    return words.fma(part, words.real(-2 * tile.softcap * LOG2E), words.real(tile.softcap * LOG2E))


def _seen(tile: Tile, limits: list[Any], slot: Any, start: Any) -> Any:
    """Return whether the thread's row sees a slot."""
    first, count, sinks, nodes, *tree = limits
    seen = words.below(words.take(slot, first), count)
    if tile.window is not None and tile.sinks:
        seen = words.any_of(seen, words.below(words.take(slot, start), sinks))
    if tile.tree_words:
        node = words.take(slot, nodes)
        bits = tree[0]
        for i in range(1, tile.tree_words):
            bits = words.select(words.below(node, words.number(32 * i)), bits, tree[i])
        inside = words.both(words.shifted(bits, words.both(node, 31)), 1)
        # A slot before the nodes is, as an unsigned number, one of the greatest.
        inside = words.any_of(words.below(words.number(0), inside), words.below(words.number(0x7FFFFFFF), node))
        seen = words.all_of(seen, inside)
    return seen


def weigh(found: list[Any], peak: Any, total: Any) -> tuple[list[Any], Any, Any, Any, Any]:
    """Return the weights of scores, the peak and the total with them, and what the sums before, and these, are times.

    Weights are relative to the greatest of these scores of the row.
    """
    here = found[0]
    for value in found[1:]:
        here = words.higher(here, value)
    here = words.higher(over_four(words.higher, here), words.real(LEAST))
    weights = [words.exp2(words.minus(value, here)) for value in found]
    new_peak = words.higher(peak, here)
    shrink, grow = words.exp2(words.minus(peak, new_peak)), words.exp2(words.minus(here, new_peak))
    own = weights[0]
    for value in weights[1:]:
        own = words.plus(own, value)
    return weights, new_peak, words.fma(own, grow, words.product(total, shrink)), shrink, grow


def mix(tile: Tile, sums: list[Any], found: list[Any], values: Any, scales: Any, base: Any, alive: Any) -> list[Any]:
    """Return a thread's sums, output, peak and total, with its warp's share of a block; `alive`: first slot, number."""
    lane = Lane()
    acc = sums[: tile.own]
    weights, new_peak, total, shrink, grow = weigh(found, *sums[-2:])
    size = words.width(scales)
    first_scales, top = at_scales(tile, lane, scales), words.number(0)
    for part in range(tile.slots // 32):
        slot = words.add(words.add(words.times(lane.warp, tile.slots), lane.index), 32 * part)
        bits = words.as_word(words.read(words.onward(words.pointer(scales), words.times(slot, size)), size))
        live = words.below(words.take(words.add(base, slot), alive[0]), alive[1])
        bits = words.select(live, words.both(bits, 0x7FFFFFFF), words.number(0))
        top = words.select(words.below(top, bits), bits, top)
    into, step = fitted(tile, words.as_float(words.highest(top)))
    scaled = []
    for i in range(0, len(weights), 2):
        steps = two_scales(words.onward(first_scales, i * 4 * size), size)
        scaled += [words.product(weights[i + c], steps[c]) for c in (0, 1)]
    seen = [words.above(value, LEAST) for value in found]
    left = tile.operands.weights(scaled, seen, into)
    grow = words.product(grow, step)
    at, live = at_values(tile, lane, values), None
    if tile.operands.masked:
        first = words.add(words.add(base, words.times(lane.warp, tile.slots)), words.times(lane.quarter, 2))
        first = words.take(first, alive[0])
        slots = [8 * eight + c for eight in range(tile.slots // 8) for c in (0, 1)]
        live = [words.below(words.add(first, slot), alive[1]) for slot in slots]
    each = tile.line // 8
    for line in range(tile.lines):
        for i, two in _columns(tile, left, at, line, live):
            for c in (0, 1):
                place = (2 * line + c) * each + i
                acc[place] = words.fma(two[c], grow, words.product(acc[place], shrink))
    return [*acc, new_peak, total]


def _columns(tile: Tile, left: list[Any], at: list[Any], line: int, live: list[Any] | None) -> Any:
    """Yield for each byte of a thread's piece of a line the sums of its two columns."""
    count = tile.line // 32
    held = []  # of each slot of the thread its words
    for eight in range(tile.slots // 8):
        held += [words.several(words.onward(at[c], (eight * tile.lines + line) * 8 * tile.line), count) for c in (0, 1)]
    if live is not None:
        zero = words.number(0)
        held = [[words.select(flag, x, zero) for x in slot] for slot, flag in zip(held, live, strict=True)]
    for word in range(count):
        for byte, rights in enumerate(tile.operands.columns([slot[word] for slot in held])):
            yield 4 * word + byte, tile.operands.multiply(left, rights)


def fitted(tile: Tile, top: Any) -> tuple[Any, Any]:
    """Return what brings numbers of at most `top` to the largest of a product, and what brings them back."""
    into = words.product(words.inverse(top), words.real(tile.operands.top))
    into = words.select(words.above(top, 1e-30), into, words.real(0.0))
    return into, words.product(top, words.real(1.0 / tile.operands.top))
