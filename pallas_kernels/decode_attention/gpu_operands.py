"""What a warp's matrix units multiply: codes as they are in shared memory, and queries and weights to match them.

A product is of left sides `[16, X]`, words of a thread in fours, and right sides `[X, 8]`, in twos, of which the first
8 rows, or both 8 rows together, are the query rows.
"""

from typing import Any

from pallas_kernels.decode_attention import gpu_instructions as words

MAGIC = 1.5 * 2.0**23 + 128.0  # added to a number it leaves it, and 128, in the last bits, rounded


class Integers:
    """Codes of int8, which are used as they are, and numbers of 16 bits in two signed bytes: two rows of the 16."""

    top = 127.0 * 256 + 127  # the largest number
    masked = False  # what a code is where nothing is alive does not matter

    @staticmethod
    def queries(values: list[Any], into: Any) -> list[Any]:
        """Return a thread's queries, `values` times `into`, in half as many words."""
        four = [[words.fma(x, into, words.real(MAGIC)) for x in values[i : i + 4]] for i in range(0, len(values), 4)]
        return [word for numbers in four for word in _bytes(numbers)]

    @staticmethod
    def scores(queries: list[Any], held: list[Any]) -> list[Any]:
        """Return the products of a thread's row with two slots of keys, of one of which it `held` the words."""
        return Integers.multiply(_every(4, queries), _every(2, held))

    @staticmethod
    def weights(values: list[Any], seen: list[Any], into: Any) -> list[list[Any]]:
        """Return the left sides of weights times `into`, 0 where they are not seen, whatever they are."""
        magic = words.real(MAGIC)
        found = [words.select(flag, words.fma(x, into, magic), magic) for x, flag in zip(values, seen, strict=True)]
        return _lefts(found)

    @staticmethod
    def lefts(values: list[Any], into: Any) -> list[list[Any]]:
        """Return the left sides of weights times `into`, all of which are numbers."""
        return _lefts([words.fma(x, into, words.real(MAGIC)) for x in values])

    @staticmethod
    def columns(slots: list[Any]) -> list[list[list[Any]]]:
        """Return of a word of each slot of values for each of its bytes the right sides."""
        turned = [_turned(slots[i : i + 4]) for i in range(0, len(slots), 4)]
        return [_every(2, [four[byte] for four in turned]) for byte in range(4)]

    @staticmethod
    def halved_columns(rows: list[Any]) -> list[list[list[Any]]]:
        """Return what `columns` does of rows whose bytes are two codes of 4 bits: first of the lower ones, of all."""
        turned = [_turned(rows[i : i + 4]) for i in range(0, len(rows), 4)]
        return [_every(2, [nibbles(four[byte], half) for half in (0, 1) for four in turned]) for byte in range(4)]

    @staticmethod
    def multiply(lefts: list[list[Any]], rights: list[list[Any]]) -> list[Any]:
        """Return the two numbers of a thread's row that the products add up to."""
        sums = None
        for left, right in zip(lefts, rights, strict=True):
            sums = words.integer_product(sums, left, right)
        return [words.to_float(words.add(words.times(sums[c], 256), sums[2 + c])) for c in (0, 1)]


class Halves:
    """Codes of float8_e4m3fn, which are float16 exactly, and numbers of float16: 8 rows of the 16."""

    top = 1.0
    masked = True  # a code may be NaN, which a weight of 0 does not undo

    @staticmethod
    def queries(values: list[Any], into: Any) -> list[Any]:
        """Return a thread's queries, `values` times `into`, in half as many words."""
        values = [words.product(value, into) for value in values]
        return [words.half_pair_of(*values[i : i + 2]) for i in range(0, len(values), 2)]

    @staticmethod
    def scores(queries: list[Any], held: list[Any]) -> list[Any]:
        """Return the products of a thread's row with two slots of keys, of one of which it `held` the words.

        The other 8 rows of a left side are the queries of its neighbour: registers hold no zeros.
        """
        even, odd = ([words.real(0.0)] * 4 for _ in range(2))
        for i in range(0, len(held), 2):
            a, b, c, d = queries[2 * i : 2 * i + 4]
            even = words.multiplied("f16", even, [a, c, b, d], list(words.halves_of(held[i])))
            odd = words.multiplied("f16", odd, [a, c, b, d], list(words.halves_of(held[i + 1])))
        return [words.plus(even[c], odd[2 + c]) for c in (0, 1)]

    @staticmethod
    def weights(values: list[Any], seen: list[Any], into: Any) -> list[list[Any]]:
        """Return the left sides of weights times `into`, 0 where they are not seen, whatever they are."""
        zero = words.real(0.0)
        values = [words.select(flag, x, zero) for x, flag in zip(values, seen, strict=True)]
        pairs = _every(2, Halves.queries(values, into))
        return [[one, words.number(0), other, words.number(0)] for one, other in pairs]

    @staticmethod
    def columns(slots: list[Any]) -> list[list[list[Any]]]:
        """Return of a word of each slot of values for each of its bytes the right sides."""
        pairs = []
        for i in range(0, len(slots), 2):
            low, high = (words.picked(*slots[i : i + 2], selector) for selector in (0x5140, 0x7362))
            pairs.append([*words.halves_of(low), *words.halves_of(high)])
        return [[[pairs[i][byte], pairs[i + 1][byte]] for i in range(0, len(pairs), 2)] for byte in range(4)]

    @staticmethod
    def multiply(lefts: list[list[Any]], rights: list[list[Any]]) -> list[Any]:
        """Return the two numbers of a thread's row that the products add up to."""
        sums = [words.real(0.0)] * 4
        for left, right in zip(lefts, rights, strict=True):
            sums = words.multiplied("f16", sums, left, right)
        return sums[:2]


def nibbles(word: Any, half: int) -> Any:
    """Return the lower, or the upper, 4 bits of each byte of a word."""
    return words.both(words.right(word, 4 * half), 0x0F0F0F0F)


def _lefts(found: list[Any]) -> list[list[Any]]:
    """Return the left sides of numbers to which MAGIC was added."""
    return _every(4, [word for i in range(0, len(found), 4) for word in _bytes(found[i : i + 4])])


def _every(count: int, held: list[Any]) -> list[list[Any]]:
    """Return a list in pieces of `count`."""
    return [held[i : i + count] for i in range(0, len(held), count)]


def _bytes(four: list[Any]) -> tuple[Any, Any]:
    """Return the high bytes and the low bytes of four numbers to which MAGIC was added."""
    four = [words.as_word(value) for value in four]
    a, b = words.picked(four[0], four[1], 0x5140), words.picked(four[2], four[3], 0x5140)
    return words.picked(a, b, 0x7632), words.differ(words.picked(a, b, 0x5410), 0x80808080)


def _turned(four: list[Any]) -> list[Any]:
    """Return four words of four bytes with rows and columns exchanged."""
    a, b = words.picked(four[0], four[1], 0x5140), words.picked(four[2], four[3], 0x5140)
    c, d = words.picked(four[0], four[1], 0x7362), words.picked(four[2], four[3], 0x7362)
    return [words.picked(*two, selector) for two in ((a, b), (c, d)) for selector in (0x5410, 0x7632)]
