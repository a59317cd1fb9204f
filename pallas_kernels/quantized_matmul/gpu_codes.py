"""How a thread of the GPU's quantized product makes floats of codes, two in a register."""

from typing import Any

from pallas_kernels.quantized_matmul import gpu_words as words
from pallas_kernels.quantized_matmul.gpu_tile import Form

# By the letters of x's dtype: how far to the right the low and the high nibble of a byte go, the bits where they then
# are, the byte that stands above them to make them a float, and the float that a nibble of zero then is. Of an fp8
# number: where its exponent goes, and the power of two that it then lacks.
FORMS = {
    "bf16": {
        "nibbles": (0, 4), "mask": 0x0F, "above": 0x43, "zero": 128, "one": 0x3F80,
        "fp8_mask": 0x07F0, "fp8_shift": 4, "fp8_power": 0x7B80,
    },
    "f16": {
        "nibbles": (-4, 0), "mask": 0xF0, "above": 0x54, "zero": 64, "one": 0x3C00,
        "fp8_mask": 0x3F80, "fp8_shift": 1, "fp8_power": 0x5C00,
    },
}  # fmt: skip
AND_XOR, AND_OR = 0x6A, 0xEA  # tables of (a & b) ^ c and (a & b) | c
TWICE, EACH = 0x10001, 0x1010101  # the same bits in both halves of a word, or in all its bytes


def bias(form: Form) -> int:
    """Return how much too large the floats are that `widened` makes of codes."""
    return (FORMS[form.letters]["zero"] + 8 * (form.qtype == "int4")) if form.late else 0


def ones(form: Form) -> Any:
    """Return two floats, both one."""
    return words.number(FORMS[form.letters]["one"] * TWICE)


def widened(form: Form, codes: Any) -> list[tuple[Any, Any]]:
    """Return of each plane of four bytes the codes of two bytes, and those of the others, as pairs of floats."""
    if form.planes == 2:
        return [_nibbles(form, codes, shift) for shift in FORMS[form.letters]["nibbles"]]
    if form.qtype == "int8":
        return [(_int8_pair(form, codes), _int8_pair(form, words.right(codes, 8)))]
    return [(_fp8_pair(form, words.right(codes, -8)), _fp8_pair(form, codes))]


def paired(form: Form, low: Any, high: Any) -> list[Any]:
    """Return four inputs of x, in two words, as `widened` pairs codes: bytes 0, 1 and 2, 3, or else 0, 2 and 1, 3."""
    if form.planes == 2:
        return [low, high]
    return [words.picked(low, high, 0x5410), words.picked(low, high, 0x7632)]


def _nibbles(form: Form, codes: Any, shift: int) -> tuple[Any, Any]:
    """Return a nibble of each byte; of a `late` tile `bias` is yet to be taken away."""
    bits_of = FORMS[form.letters]
    mask = bits_of["mask"]
    flipped = mask // 15 * 8 if form.qtype == "int4" else 0
    bits = words.chosen(words.right(codes, shift), mask * EACH, flipped * EACH, AND_XOR)
    above = words.number(bits_of["above"])
    pairs = words.picked(bits, above, 0x4140), words.picked(bits, above, 0x4342)
    if form.late:
        return pairs
    zero = (bits_of["above"] << 8 | flipped) * TWICE
    return tuple(words.pairwise("sub", form.letters, pair, zero) for pair in pairs)


def _int8_pair(form: Form, codes: Any) -> Any:
    """Return the int8 numbers of bytes 0 and 2 as floats."""
    if form.letters == "f16":
        bits = 0x6480 * TWICE  # 1024, and the sign flipped: 128 too
        return words.pairwise("sub", form.letters, words.chosen(codes, 0x00FF00FF, bits, AND_XOR), bits)
    # Eight bits don't fit the mantissa: 128 and the low seven, less 128 or, of a negative number, 256.
    low = words.chosen(codes, 0x007F007F, 0x4300 * TWICE, AND_OR)
    sign = words.chosen(codes, 0x00800080, 0x4300 * TWICE, AND_OR)
    return words.pairwise("sub", form.letters, low, sign)


def _fp8_pair(form: Form, codes: Any) -> Any:
    """Return the float8_e4m3fn numbers of bytes 1 and 3 as floats; a product makes their exponents right, exactly."""
    bits_of = FORMS[form.letters]
    sign = words.both(codes, 0x8000 * TWICE)
    bits = words.chosen(words.right(codes, bits_of["fp8_shift"]), bits_of["fp8_mask"] * TWICE, sign, AND_OR)
    return words.pairwise("mul", form.letters, bits, bits_of["fp8_power"] * TWICE)
