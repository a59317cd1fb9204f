"""What a thread does to pack its numbers of a group: see `gpu`.

A thread has the same 8 channels of some tokens r, and of the tokens r + G / 2, which share bytes with them. Of keys,
whose grids are of channels, a warp takes all tokens of 32 channels; of values, whose grids are of tokens, as many
numbers: a part of the tokens, of all channels of a run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention.gpu_lanes import two_floats, words_of
from pallas_kernels.kivi_pack.reference import TOP

WARPS = 4
CHANNELS = 8  # of a thread: 16 bytes, read at once
WIDTH = 32  # channels of keys that a warp takes


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many heads a token has, of how many numbers; slots of the ring; tokens of a group, and groups in a row."""

    heads: int
    H: int
    R: int
    G: int
    M: int
    run: int  # channels of a value that share a grid

    @property
    def warps(self) -> int:
        """How many of them take a row's keys, and as many its values."""
        return self.heads * self.H // WIDTH

    @property
    def pairs(self) -> int:
        """Pairs of tokens of a thread: its warp has 32 numbers for each token of a group."""
        return self.G * WIDTH // (32 * CHANNELS) // 2


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a thread stands: its head, the first of its channels, and the first of its tokens in a group."""

    head: Any
    channel: Any
    token: Any
    column: Any  # the thread's number of those that lie `across` the channels of a token
    row: Any  # and of the others, which have other tokens
    across: int
    wanted: Any  # 1, or 0 past the last warp: it reads what that one does, and writes nothing

    def tokens(self, sizes: Sizes) -> list[int]:
        """Return how far the thread's tokens are from its first: those of the low bits, then those of the high ones."""
        first = [i * (32 // self.across) for i in range(sizes.pairs)]
        return [*first, *(token + sizes.G // 2 for token in first)]


def pack_keys(sizes: Sizes, refs: dict[str, Any], four: Any, index: Any, slot: Any) -> None:
    """Pack the thread's numbers of a group of a row's keys; it is in one of the `four`-th four warps.

    `refs`: "ring" `[K, R, H]`, which has the group from `slot` on; "codes" `[K, M G / 2, H]`, "scale" and "offset"
    `[K, M, H]`, which get it at place `index`.
    """
    at = _place(sizes, four, WIDTH)
    tokens = _held(sizes, refs["ring"], at, slot)
    channels = list(zip(*tokens, strict=True))
    low, high = ([_over(pick, x, at.across, 32) for x in channels] for pick in (words.smaller, words.larger))
    scale = [_scale(*ends) for ends in zip(low, high, strict=True)]
    place = words.add(words.times(words.add(words.times(at.head, sizes.M), index), sizes.H), at.channel)
    wanted = words.both(at.wanted, words.less(at.row, 1))
    for name, grid in (("scale", scale), ("offset", low)):
        to = words.onward(words.pointer(refs[name]), words.times(place, 2))
        words.write_words(to, words_of(grid, "bf16"), wanted)
    steps = [_step(x) for x in scale]
    _write(sizes, refs["codes"], at, index, [_codes(x, low, steps) for x in tokens])


def pack_values(sizes: Sizes, refs: dict[str, Any], four: Any, index: Any, slot: Any) -> None:
    """As `pack_keys`, of values, whose "scale" and "offset" are `[K runs, M G]`."""
    at = _place(sizes, four, sizes.run)
    line = words.add(words.times(at.head, sizes.H // sizes.run), words.quotient(at.channel, sizes.run))
    first = words.add(words.times(words.add(words.times(line, sizes.M), index), sizes.G), at.token)
    wanted, codes = words.both(at.wanted, words.less(at.column, 1)), []
    for numbers, token in zip(_held(sizes, refs["ring"], at, slot), at.tokens(sizes), strict=True):
        low, high = (_over(pick, numbers, 1, at.across) for pick in (words.smaller, words.larger))
        scale = _scale(low, high)
        for name, grid in (("scale", scale), ("offset", low)):
            to = words.onward(words.pointer(refs[name]), words.times(words.add(first, token), 2))
            words.write_part(to, words.pair_of(grid, grid), 2, wanted)
        codes.append(_codes(numbers, [low] * CHANNELS, [_step(scale)] * CHANNELS))
    _write(sizes, refs["codes"], at, index, codes)


def _place(sizes: Sizes, four: Any, width: int) -> _Place:
    """Return where a thread stands whose warp takes `width` channels of a head."""
    index, across, of_head = words.thread(), width // CHANNELS, sizes.H // WIDTH
    lane, warp = words.both(index, 31), words.add(words.times(four, WARPS), words.right(index, 5))
    wanted = words.select(words.below(warp, words.number(sizes.warps)), words.number(1), words.number(0))
    warp = words.lesser(warp, words.number(sizes.warps - 1))
    head, part = words.quotient(warp, of_head), words.remainder(warp, of_head)
    column, row = words.both(lane, across - 1), words.quotient(lane, across)
    same = width // WIDTH  # warps that have the same channels
    first = words.times(words.remainder(part, same), 32 // across * sizes.pairs)
    channel = words.add(words.times(words.quotient(part, same), width), words.times(column, CHANNELS))
    return _Place(head, channel, words.add(first, row), column, row, across, wanted)


def _held(sizes: Sizes, ring: Any, at: _Place, slot: Any) -> list[list[Any]]:
    """Return the thread's numbers of each of its tokens."""
    first = words.add(words.add(words.times(at.head, sizes.R), slot), at.token)
    begin = words.add(words.times(first, sizes.H), at.channel)
    begin = words.onward(words.pointer(ring), words.times(begin, 2))
    held = [words.several(words.onward(begin, 2 * sizes.H * token), 4) for token in at.tokens(sizes)]
    return [[value for word in four for value in two_floats(word)] for four in held]


def _over(pick: Callable[[Any, Any], Any], values: Any, apart: int, end: int) -> Any:
    """Return what `pick` leaves of the thread's values and those of threads `apart`, 2 `apart`, ... below `end`."""
    found, *rest = values
    for value in rest:
        found = pick(found, value)
    while apart < end:
        found, apart = pick(found, words.neighbour(found, apart)), 2 * apart
    return found


def _scale(low: Any, high: Any) -> Any:
    """Return a grid's scale; `low` is its offset as it is, a number of bfloat16."""
    scale = words.divided(words.minus(high, low), words.real(TOP))
    return two_floats(words.pair_of(scale, scale))[0]


def _step(scale: Any) -> Any:
    return words.select(words.above(scale, 0.0), scale, words.real(1.0))


def _codes(values: list[Any], low: list[Any], steps: list[Any]) -> list[Any]:
    """Return codes, a byte each, in words of four."""
    parts = [words.divided(words.minus(x, a), by) for x, a, by in zip(values, low, steps, strict=True)]
    parts = [words.smaller(x, words.real(TOP)) for x in parts]
    return [words.signed_bytes(parts[i : i + 4]) for i in range(0, CHANNELS, 4)]


def _write(sizes: Sizes, ref: Any, at: _Place, index: Any, codes: list[list[Any]]) -> None:
    """Write the codes of the thread's tokens, two of them in a byte."""
    half = sizes.G // 2
    row = words.add(words.times(words.add(words.times(at.head, sizes.M), index), half), at.token)
    begin = words.onward(words.pointer(ref), words.add(words.times(row, sizes.H), at.channel))
    tokens = at.tokens(sizes)[: sizes.pairs]
    for token, low, high in zip(tokens, codes[: sizes.pairs], codes[sizes.pairs :], strict=True):
        both = [words.either(a, words.right(b, -4)) for a, b in zip(low, high, strict=True)]
        words.write_words(words.onward(begin, sizes.H * token), both, at.wanted)
