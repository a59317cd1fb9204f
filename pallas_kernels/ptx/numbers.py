"""What PTX's instructions make of numbers, on NumPy arrays of a warp's 32 lanes, as bits: unsigned integers."""

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Bits = NDArray[np.unsignedinteger]
u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64
BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


def bf16(bits: Bits) -> NDArray[np.float32]:
    """Return bfloat16 numbers as float32."""
    return (bits.astype(u4) << u4(16)).view(f4)


def to_bf16(x: NDArray[np.float64]) -> Bits:
    """Return numbers of double precision as bfloat16, rounded once, to the nearest and ties to even."""
    near = x.astype(f4)
    bits = near.view(u4).copy()
    off = np.isfinite(near) & (near.astype(f8) != x)
    down = off & (np.abs(near.astype(f8)) > np.abs(x))
    bits[down] -= u4(1)  # cut instead of rounded,
    bits[off] |= u4(1)  # and odd where something was cut off: the second rounding then sees it
    rounded = (bits + u4(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u4(16)
    return np.where(np.isnan(near), u4(0x7FFF), rounded).astype(u2)


def halves(x: Bits) -> tuple[Bits, Bits]:
    """Return the low and the high 16 bits."""
    return x.astype(u2), (x >> u4(16)).astype(u2)


def joined(low: Bits, high: Bits) -> Bits:
    """Return 32 bits of two times 16."""
    return low.astype(u4) | (high.astype(u4) << u4(16))


def _two(operation, x):
    low, high = zip(*(halves(one) for one in x), strict=True)
    return joined(operation(*low), operation(*high))


def bf16x2(operation, *x: Bits) -> Bits:
    """Return an operation on two bfloat16 numbers each, rounded once."""
    return _two(lambda *half: to_bf16(operation(*(bf16(one).astype(f8) for one in half))), x)


def f16x2(operation, *x: Bits) -> Bits:
    """Return an operation on two float16 numbers each."""
    return _two(lambda *half: operation(*(one.view(f2).astype(f8) for one in half)).astype(f2).view(u2), x)


def pair(kind: str, high: NDArray[np.float32], low: NDArray[np.float32]) -> Bits:
    """Return two float32 numbers as two of 16 bits."""
    if kind == "bf16":
        return joined(to_bf16(low.astype(f8)), to_bf16(high.astype(f8)))
    return joined(low.astype(f2).view(u2), high.astype(f2).view(u2))


def from_e4m3(x: Bits) -> Bits:
    """Return two numbers of 8 bits as two float16."""
    low, high = (part.astype(u1).view(E4M3).astype(f2).view(u2) for part in (x & u2(255), x >> u2(8)))
    return joined(low, high)


def to_e4m3(high: NDArray[np.float32], low: NDArray[np.float32]) -> Bits:
    """Return two float32 numbers as two of 8 bits; what is too large becomes the largest."""
    first, second = (np.clip(x, -448, 448).astype(E4M3).view(u1).astype(u2) for x in (low, high))
    return first | (second << u2(8))


def prmt(low: Bits, high: Bits, selector: Bits) -> Bits:
    """Return four of the eight bytes of two words, or their signs, as the selector's four digits say."""
    both = low.astype(u8) | (high.astype(u8) << u8(32))
    found = np.zeros_like(low)
    for place in range(4):
        digit = (selector >> u4(4 * place)) & u4(15)
        byte = ((both >> (u8(8) * (digit & u4(7)))) & u8(255)).astype(u4)
        byte = np.where(digit & u4(8), np.where(byte & u4(128), u4(255), u4(0)), byte)
        found = found | (byte << u4(8 * place))
    return found


def lop3(a: Bits, b: Bits, c: Bits, table: int) -> Bits:
    """Return a logical function of three words, by its truth table."""
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            found = found | ((a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c))
    return found


def bfe(x: Bits, start: Bits, length: Bits, signed: bool) -> Bits:
    """Return a field of bits."""
    width = x.dtype.type(x.dtype.itemsize * 8)
    one, start, length = x.dtype.type(1), start.astype(x.dtype), length.astype(x.dtype)
    field = (x >> start) & np.where(length >= width, ~x.dtype.type(0), (one << length) - one)
    if not signed:
        return field
    sign = (field >> (length - one)) & one
    return np.where(sign.astype(bool), field | ~((one << length) - one), field)


def shift_left(x: Bits, count: Bits) -> Bits:
    """Return `x << count`, nothing where all is shifted out."""
    bits = x.dtype.itemsize * 8
    return np.where(count < u4(bits), x << (count & u4(bits - 1)).astype(x.dtype), x.dtype.type(0))


def shift_right(x: NDArray, count: Bits) -> NDArray:
    """Return `x >> count`; of signed numbers the sign stays."""
    bits = x.dtype.itemsize * 8
    near = np.minimum(count, u4(bits - 1)).astype(x.dtype)
    return x >> near if x.dtype.kind == "i" else np.where(count < u4(bits), x >> near, x.dtype.type(0))


def multiply_high(a: NDArray, b: NDArray) -> NDArray:
    """Return the upper half of a product."""
    bits = 8 * a.dtype.itemsize
    return np.array([int(x) * int(y) >> bits for x, y in zip(a, b, strict=True)], object).astype(a.dtype)


def to_integer(x: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the nearest integers, ties to even; no number is 0, and what is too large the largest."""
    near = np.clip(np.rint(x.astype(f8)), -(2.0**31), 2.0**31 - 1)
    return np.where(np.isnan(x), 0, near).astype(i4)
