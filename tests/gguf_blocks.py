"""GGUF's block formats, one number at a time, as ggml defines them: the reference for the vectorized reader."""

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type


def _f16(block: bytes, at: int) -> float:
    return float(np.frombuffer(block[at : at + 2], "<f2")[0])


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _simple(block: bytes, *, fifth_bit: bool, minimum: bool) -> list[float]:
    """Q4_0, Q4_1, Q5_0 and Q5_1: 32 numbers; the low halves of 16 bytes, then the high ones."""
    scale, at = _f16(block, 0), 2
    offset = -scale * (16 if fifth_bit else 8)
    if minimum:
        offset, at = _f16(block, 2), 4
    bits = int.from_bytes(block[at : at + 4], "little") if fifth_bit else 0
    quants = block[at + 4 * fifth_bit :]
    halves = [q & 15 for q in quants] + [q >> 4 for q in quants]
    return [scale * (q | (bits >> i & 1) << 4) + offset for i, q in enumerate(halves)]


def _six_bit(scales: bytes, j: int) -> tuple[int, int]:
    """Return scale and minimum `j` of the eight pairs that Q4_K and Q5_K pack in 12 bytes."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return scales[j + 4] & 15 | scales[j - 4] >> 6 << 4, scales[j + 4] >> 4 | scales[j] >> 6 << 4


def _k4_k5(block: bytes, *, fifth_bit: bool) -> list[float]:
    scale, minimum, scales = _f16(block, 0), _f16(block, 2), block[4:16]
    high, quants = (block[16:48], block[48:]) if fifth_bit else (bytes(32), block[16:])
    out = []
    for j in range(8):
        s, m = _six_bit(scales, j)
        for i in range(32):
            q = quants[j // 2 * 32 + i] >> 4 * (j % 2) & 15 | (high[i] >> j & 1) << 4
            out.append(scale * s * q - minimum * m)
    return out


def _k6(block: bytes) -> list[float]:
    low, high, scales, scale = block[:128], block[128:192], block[192:208], _f16(block, 208)
    out = []
    for i in range(256):
        half, quarter, j = i // 128, i % 128 // 32, i % 32
        q = low[half * 64 + quarter % 2 * 32 + j] >> 4 * (quarter // 2) & 15
        q |= (high[half * 32 + j] >> 2 * quarter & 3) << 4
        out.append(scale * _signed(scales[i // 16]) * (q - 32))
    return out


DECODE = {
    Type.Q8_0: lambda b: [_f16(b, 0) * _signed(q) for q in b[2:]],
    Type.Q4_0: lambda b: _simple(b, fifth_bit=False, minimum=False),
    Type.Q4_1: lambda b: _simple(b, fifth_bit=False, minimum=True),
    Type.Q5_0: lambda b: _simple(b, fifth_bit=True, minimum=False),
    Type.Q5_1: lambda b: _simple(b, fifth_bit=True, minimum=True),
    Type.Q4_K: lambda b: _k4_k5(b, fifth_bit=False),
    Type.Q5_K: lambda b: _k4_k5(b, fifth_bit=True),
    Type.Q6_K: _k6,
}
SCALES_AT = {Type.Q4_1: (0, 2), Type.Q5_1: (0, 2), Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}


def random_blocks(kind: Type, rows: int, columns: int) -> np.ndarray:
    """Return the bytes of a [rows, columns] tensor: any quants, scales between 0.01 and 1."""
    rng = np.random.default_rng(int(kind))
    size, width = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // size, width)).astype(np.uint8)
    for at in SCALES_AT.get(kind, (0,)):
        scales = rng.uniform(0.01, 1.0, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def decode(kind: Type, data: np.ndarray, columns: int) -> np.ndarray:
    """Return the float32 tensor whose rows `data` holds."""
    width = GGML_QUANT_SIZES[kind][1]
    numbers = [x for block in data.reshape(-1, width) for x in DECODE[kind](block.tobytes())]
    return np.array(numbers, np.float32).reshape(-1, columns)
