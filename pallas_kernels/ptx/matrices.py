"""The matrix instructions: which lane's register holds which entry, and where a descriptor's tile lies."""

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.ptx import numbers
from pallas_kernels.ptx.memory import swizzled

_LANE = np.arange(32)
_ROW, _COLUMN = _LANE // 4, _LANE % 4


def wide(bits: NDArray[np.uint32], kind: str) -> NDArray:
    """Return the entries of words `[..., 32]` as numbers `[..., 32, n]`."""
    if kind == "s8":
        return bits[..., None].view(np.int8).astype(np.int32)
    half = bits[..., None].view(np.uint16)
    return numbers.bf16(half) if kind == "bf16" else half.view(np.float16).astype(np.float32)


def rows_of_a(bits: NDArray[np.uint32], kind: str) -> NDArray:
    """Return the 16 rows of A that four registers of a warp hold."""
    x = wide(bits, kind)  # register, lane, entry
    n = x.shape[-1]
    found = np.empty((16, 8 * n), x.dtype)
    for register in range(4):
        row, first = _ROW + 8 * (register % 2), 4 * n * (register // 2)
        found[row[:, None], first + _COLUMN[:, None] * n + np.arange(n)] = x[register]
    return found


def columns_of_b(bits: NDArray[np.uint32], kind: str) -> NDArray:
    """Return the 8 columns of B that two registers of a warp hold, `[k, 8]`."""
    x = wide(bits, kind)
    n = x.shape[-1]
    found = np.empty((8 * n, 8), x.dtype)
    for register in range(2):
        found[4 * n * register + _COLUMN[:, None] * n + np.arange(n), _ROW[:, None]] = x[register]
    return found


def _place(register: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the row and the column of each lane's sum in a register."""
    return _ROW + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * _COLUMN + register % 2


def of_fragment(x: NDArray) -> NDArray:
    """Return the sums `[16, n]` that registers `[n / 2, 32]` of a warp hold."""
    found = np.empty((16, 2 * len(x)), x.dtype)
    for register, held in enumerate(x):
        found[_place(register)] = held
    return found


def to_fragment(sums: NDArray) -> NDArray:
    """Return the registers `[n / 2, 32]` of a warp that hold sums `[16, n]`."""
    return np.stack([sums[_place(register)] for register in range(sums.shape[1] // 2)])


def mma(kind: str, a: NDArray, b: NDArray, c: NDArray) -> NDArray[np.uint32]:
    """Return the registers of `a @ b + c` of a warp: 16 rows, 8 columns."""
    number = np.int32 if kind == "s8" else np.float32
    sums = of_fragment(c.view(number)) + rows_of_a(a, kind) @ columns_of_b(b, kind)
    return to_fragment(sums.astype(number)).view(np.uint32)


def tile(descriptor: int, rows: int, depth: int, turned: bool) -> NDArray[np.int64]:
    """Return the addresses `[rows, depth]` of 16-bit entries that a descriptor of wgmma names, in a block's memory.

    `turned`: rows are contiguous, and not the entries of a row. PTX ISA, "Shared memory matrix layout".
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    row, k = np.arange(rows)[:, None], np.arange(depth)[None, :]
    entries = swizzle // 2  # contiguous ones
    if turned and swizzle == 16:
        at = row % 8 * 2 + row // 8 * stride + k % 8 * 16 + k // 8 * leading
    elif turned:
        at = row % entries * 2 + row // entries * leading + k % 8 * swizzle + k // 8 * stride
    elif swizzle == 16:
        at = row % 8 * 16 + row // 8 * stride + k % 8 * 2 + k // 8 * leading
    else:
        at = row % 8 * swizzle + row // 8 * stride + k * 2
    return swizzled(start + at, swizzle)
