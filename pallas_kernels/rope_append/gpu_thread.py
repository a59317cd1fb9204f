"""What a thread does to rotate its numbers of a head, and to write them: see `gpu`.

A warp takes a head. A thread has the same `pairs` numbers in a row of both halves, which turn together.
"""

import dataclasses
from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words
from pallas_kernels.decode_attention.gpu_lanes import two_floats, words_of
from pallas_kernels.rope_append.reference import LARGEST

WARPS = 4


@dataclasses.dataclass(frozen=True)
class Heads:
    """How many heads of queries a token has, and of keys, of how many numbers; slots and dtype of the caches."""

    queries: int
    kv: int
    H: int
    S: int
    stored: str

    @property
    def all(self) -> int:
        """Heads of queries, keys and values."""
        return self.queries + 2 * self.kv

    @property
    def pairs(self) -> int:
        """Numbers of a thread in each half of a head."""
        return self.H // 64

    @property
    def quantized(self) -> bool:
        """Whether the caches have scales."""
        return self.stored in LARGEST


def rotate_and_write(heads: Heads, refs: dict[str, Any], group: Any, slot: Any, kept: Any) -> None:
    """Rotate and write the thread's numbers of the head that is its warp's of a group of four, of one token.

    `refs`: "heads", all of the token's `[(N + 2 K) H]`, "cos" and "sin" `[H / 2]`, "q" `[N H]` for its queries, and of
    its row the caches "k", "v" `[K, S, H]`, perhaps "k_scale", "v_scale" `[K, S]`, which get it at `slot` if it is
    `kept`, 1 or 0.
    """
    index, none = words.thread(), words.number(0)
    lane, head = words.both(index, 31), words.add(words.times(group, WARPS), words.right(index, 5))
    own = words.times(lane, heads.pairs)
    row = words.times(words.lesser(head, words.number(heads.all - 1)), heads.H)  # past the last: read, not written
    at = words.onward(words.pointer(refs["heads"]), words.times(words.add(row, own), 2))
    low, high = (_numbers(words.onward(at, by), heads.pairs) for by in (0, heads.H))
    cos, sin = (_angles(words.onward(words.pointer(refs[x]), words.times(own, 4)), heads.pairs) for x in ("cos", "sin"))
    turns = words.below(head, words.number(heads.queries + heads.kv))
    for i, (a, b) in enumerate(zip(low, high, strict=True)):
        back = words.product(sin[i], words.real(-1.0))
        low[i] = words.select(turns, words.fma(a, cos[i], words.product(b, back)), a)
        high[i] = words.select(turns, words.fma(b, cos[i], words.product(a, sin[i])), b)
    halves = [_rounded(low), _rounded(high)]
    query = words.select(words.below(head, words.number(heads.queries)), words.number(1), none)
    _write(words.onward(words.pointer(refs["q"]), words.times(words.add(row, own), 2)), heads.H, halves, query)
    for name, first in (("k", heads.queries), ("v", heads.queries + heads.kv)):
        head_of = words.add(head, -first)
        mine = words.below(head_of, words.number(heads.kv))
        entry = words.select(mine, words.add(words.times(head_of, heads.S), slot), none)
        _append(heads, refs, name, halves, lane, entry, words.select(mine, kept, none))


def _append(
    heads: Heads, refs: dict[str, Any], name: str, halves: list[Any], lane: Any, entry: Any, wanted: Any
) -> None:
    """Write a thread's part of a head to an entry of its cache, if it is `wanted`."""
    number = words.add(words.times(entry, heads.H), words.times(lane, heads.pairs))
    if not heads.quantized:
        _write(words.onward(words.pointer(refs[name]), words.times(number, 2)), heads.H, halves, wanted)
        return
    scale, codes = _coded(heads, [_floats(half, heads.pairs) for half in halves])
    place = words.onward(words.pointer(refs[f"{name}_scale"]), words.times(entry, 2))
    words.write_part(place, words.pair_of(scale, scale), 2, words.both(wanted, words.less(lane, 1)))
    _write(words.onward(words.pointer(refs[name]), number), heads.H // 2, codes, wanted)


def _coded(heads: Heads, halves: list[list[Any]]) -> tuple[Any, list[list[Any]]]:
    """Return a head's scale, and the thread's codes of both halves, in a word each."""
    largest, peak = LARGEST[heads.stored], words.real(0.0)
    for value in (*halves[0], *halves[1]):
        peak = words.higher(peak, words.magnitude(value))
    peak = words.as_float(words.highest(words.as_word(peak)))  # what is not negative has its bits in the same order
    scale = _floats([words.pair_of(words.divided(peak, words.real(largest)), words.real(0.0))], 1)[0]
    by = words.select(words.above(scale, 0.0), scale, words.real(1.0))
    code = words.signed_bytes if heads.stored == "int8" else words.eight_bits
    inside = [[words.within(words.divided(value, by), largest) for value in half] for half in halves]
    return scale, [[code(half)] for half in inside]


def _numbers(address: Any, pairs: int) -> list[Any]:
    """Return bfloat16 numbers in a row as floats."""
    return [words.read(address, 2)] if pairs == 1 else _floats(words.several(address, pairs // 2), pairs)


def _angles(address: Any, pairs: int) -> list[Any]:
    if pairs == 1:
        return [words.read(address, 4)]
    return [words.as_float(word) for word in words.several(address, pairs)]


def _floats(held: list[Any], count: int) -> list[Any]:
    """Return so many floats of words of two bfloat16 numbers."""
    return [value for word in held for value in two_floats(word)][:count]


def _rounded(values: list[Any]) -> list[Any]:
    """Return floats as bfloat16, two in a word; one alone in its lower half."""
    return words_of(values + [words.real(0.0)] * (len(values) % 2), "bf16")


def _write(address: Any, apart: int, halves: list[list[Any]], wanted: Any) -> None:
    """Write the thread's part of both halves, each of `apart` bytes."""
    size = apart // 32
    for half, by in zip(halves, (0, apart), strict=True):
        at = words.onward(address, by)
        if size >= 4:
            words.write_words(at, half, wanted)
        else:
            words.write_part(at, half[0], size, wanted)
