"""What a warp of the GPU's quantized product does with its registers: codes become floats in place, and are multiplied.

A matrix instruction takes 16 outputs x 16 inputs of the weight and 16 inputs x 8 rows of x, and which of its inputs is
which is nobody's business but that both sides agree. So a thread of the four that share an output reads four bytes that
lie together, wherever they lie, and takes the same four inputs of x: no register of the weight ever changes hands.
"""

import dataclasses
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

CHUNK = 16  # bytes of an output that four threads share
LINE = 128  # bytes of an output, or of a row of x, that lie together in shared memory
BANKS = 8  # chunks of a line: that of an output or row r lies at its own place ^ r % 8

# By the letters of x's dtype: bits that make a small integer in a float's mantissa a float (the integer of four bits
# with its sign flipped, that of eight likewise), one, and what brings an fp8 number's exponent to the float's.
FORMS = {
    "bf16": {"int4": 0x4308, "uint4": 0x4300, "one": 0x3F80, "fp8_mask": 0x07F0, "fp8_shift": 4, "fp8_power": 0x7B80},
    "f16": {"int4": 0x6408, "uint4": 0x6400, "one": 0x3C00, "fp8_mask": 0x3F80, "fp8_shift": 1, "fp8_power": 0x5C00},
}
AND_XOR, AND_OR = 0x6A, 0xEA  # lop3 tables of (a & b) ^ c and (a & b) | c


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block multiplies in a step: `lines` of `outputs` against `rows` of x."""

    qtype: str
    letters: str  # of x's dtype, as PTX names it
    outputs: int
    rows: int  # a multiple of 8
    lines: int
    segment: int  # chunks whose sum is kept apart; 0: all sums run on
    group: int  # chunks of a group
    offset: bool
    rounded: bool  # x is in steps

    @property
    def planes(self) -> int:
        """Codes in a byte."""
        return 2 if self.qtype in ("int4", "uint4") else 1

    @property
    def strips(self) -> int:
        """Strips of 16 outputs that a warp has."""
        return self.outputs // 64

    @property
    def inputs(self) -> int:
        """Inputs of a step."""
        return self.lines * LINE * self.planes

    @property
    def sums(self) -> int:
        """Registers of a thread's sums that a step hands to the next, those of x alone last."""
        return (4 * self.strips + (4 if self.offset and not self.segment else 0)) * (self.rows // 8)


def place(column: int) -> int:
    """Return the row of x, of 8, that stands in a column: four neighbours then meet no bank of shared memory twice."""
    return (column & 3) << 1 | column >> 2


def multiply(tile: Tile, sums: list[Any], weight: Any, x: Any, scales: Any) -> list[Any]:
    """Return the sums with a step's products added: `weight`, `x` and the `scales` by name are in shared memory."""
    lane = _Lane()
    at_weight = [utils.memref_ptr(weight), *_weight_offsets(tile, lane)]
    at_x = [utils.memref_ptr(x), *_x_offsets(lane)]
    sums = list(sums)
    chunks = tile.lines * BANKS
    segment = tile.segment or chunks
    for first in range(0, chunks, segment):
        if tile.segment:
            own = [_float(0.0)] * (4 * (tile.strips + tile.offset) * (tile.rows // 8))
        else:
            own = sums
        for chunk in range(first, first + segment):
            own = _chunk(tile, own, at_weight, at_x, chunk)
        sums = scaled(tile, lane, sums, own, scales, first // tile.group) if tile.segment else own
    return sums


def scaled(tile: Tile, lane: Any, sums: list[Any], own: list[Any], scales: Any, group: int) -> list[Any]:
    """Return the sums with a group's added, times its scales: row `group` of what `scales` holds."""
    lane = lane or _Lane()
    sums = list(sums)
    blocks = tile.rows // 8
    steps = [[None, None]] * blocks
    if tile.rounded:
        width = 4 * max(tile.rows, 32)
        steps = [
            [_load_float(scales["step"], 4, group * width + 32 * n, lane.row_of_x(c)) for c in (0, 1)]
            for n in range(blocks)
        ]
    for i in range(tile.strips):
        for half in (0, 1):
            row = i * 16 + half * 8
            scale = _read_scale(tile, scales["scale"], group, row, lane)
            offset = _read_scale(tile, scales["offset"], group, row, lane) if tile.offset else None
            for n in range(blocks):
                for c in (0, 1):
                    at = (i * blocks + n) * 4 + half * 2 + c
                    part = arith.mulf(own[at], scale)
                    if tile.offset:
                        part = _fma(own[(tile.strips * blocks + n) * 4 + c], offset, part)
                    if tile.rounded:
                        sums[at] = _fma(part, steps[n][c], sums[at])
                    else:
                        sums[at] = arith.addf(sums[at], part) if tile.offset else _fma(own[at], scale, sums[at])
    return sums


def store(tile: Tile, sums: list[Any], out: Any, size: int, where: Any, shape: tuple[int, int]) -> None:
    """Write the sums, `size` bytes each, to `out` `[..., rows, outputs]` of that shape, from `where` = (row, output) on."""
    lane = _Lane()
    rows, outputs = shape
    base = utils.memref_ptr(out)
    blocks = tile.rows // 8
    for i in range(tile.strips):
        for half in (0, 1):
            output = _add(_add(where[1], lane.first(tile)), i * 16 + half * 8)
            inside = arith.cmpi(arith.CmpIPredicate.slt, output, _int(outputs))
            for n in range(blocks):
                for c in (0, 1):
                    row = _add(lane.row_of_x(c), n * 8)
                    seen = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.slt, row, _int(rows)))
                    at = _add(_mul(_add(where[0], row), outputs), output)
                    value = sums[(i * blocks + n) * 4 + half * 2 + c]
                    _store(_offset(base, _mul(at, size)), value, size, tile.letters, seen)


class _Lane:
    """Where a thread stands in its warpgroup."""

    def __init__(self):
        index = arith.remui(utils.thread_idx(), _int(128))
        self.warp = arith.divui(index, _int(32))
        lane = arith.remui(index, _int(32))
        self.group = arith.divui(lane, _int(4))  # the output, of 8, and the column of x
        self.quarter = arith.remui(lane, _int(4))

    def first(self, tile: Tile) -> Any:
        """Return the first of the thread's outputs in the block."""
        return _add(_mul(self.warp, 16 * tile.strips), self.group)

    def column(self) -> Any:
        """Return the row of x that the thread reads, of 8."""
        return self._place(self.group)

    def row_of_x(self, c: int) -> Any:
        """Return the row of x, of 8, of the thread's c-th sum."""
        return self._place(_add(_mul(self.quarter, 2), c))

    def _place(self, column: Any) -> Any:
        return arith.ori(arith.shli(arith.andi(column, _int(3)), _int(1)), arith.shrui(column, _int(2)))


def _weight_offsets(tile: Tile, lane: _Lane) -> list[Any]:
    """Return the offset of the thread's word in each chunk of its first output."""
    base = _add(_mul(lane.first(tile), LINE), _mul(lane.quarter, 4))
    return [_add(base, _mul(arith.xori(lane.group, _int(c)), CHUNK)) for c in range(BANKS)]


def _x_offsets(lane: _Lane) -> list[Any]:
    """Return the offset of the thread's four inputs in each 16 of a line of its row of x."""
    row = lane.column()
    base = _add(_mul(row, LINE), _mul(arith.andi(lane.quarter, _int(1)), 8))
    own = arith.xori(row, arith.shrui(lane.quarter, _int(1)))
    return [_add(base, _mul(arith.xori(own, _int(2 * b)), CHUNK)) for b in range(4)]


def _chunk(tile: Tile, sums: list[Any], at_weight: list[Any], at_x: list[Any], chunk: int) -> list[Any]:
    """Return the sums with the products of a chunk added."""
    sums = list(sums)
    blocks = tile.rows // 8
    line, place_in_line = divmod(chunk, BANKS)
    base, *offsets = at_weight
    words = []
    for i in range(tile.strips):
        start = (line * tile.outputs + i * 16) * LINE
        halves = [_load(base, offsets[place_in_line], start + half * 8 * LINE) for half in (0, 1)]
        words.append([_widened(tile, word) for word in halves])
    base, *offsets = at_x
    for plane in range(tile.planes):
        sixteen = chunk * tile.planes + plane
        for n in range(blocks):
            start = ((sixteen // 4) * tile.rows + n * 8) * LINE
            low, high = _load_pair(base, offsets[sixteen % 4], start)
            right = [_permuted(low, high, 0x5410), _permuted(low, high, 0x7632)]
            for i in range(tile.strips):
                (a, b), (c, d) = words[i][0][plane], words[i][1][plane]
                at = (i * blocks + n) * 4
                sums[at : at + 4] = _mma(tile, sums[at : at + 4], [a, c, b, d], right)
            if tile.offset:
                one = _int(FORMS[tile.letters]["one"] * 0x10001)
                at = (tile.strips * blocks + n) * 4
                sums[at : at + 4] = _mma(tile, sums[at : at + 4], [one] * 4, right)
    return sums


def _widened(tile: Tile, word: Any) -> list[tuple[Any, Any]]:
    """Return of each plane of a word of codes those of bytes 0 and 2, and of bytes 1 and 3, as pairs of floats."""
    form = FORMS[tile.letters]
    if tile.planes == 2:
        bits = form[tile.qtype] * 0x10001
        pairs = [_lop3(_shifted(word, s), 0x000F000F, bits, AND_XOR) for s in (0, 8, 4, 12)]
        pairs = [_pair_op("sub", tile, pair, bits) for pair in pairs]
        return [(pairs[0], pairs[1]), (pairs[2], pairs[3])]
    if tile.qtype == "int8":
        return [tuple(_int8_pair(tile, _shifted(word, s)) for s in (0, 8))]
    return [(_fp8_pair(tile, _shifted(word, -8)), _fp8_pair(tile, word))]


def _int8_pair(tile: Tile, word: Any) -> Any:
    """Return the int8 numbers of bytes 0 and 2 as floats."""
    if tile.letters == "f16":
        bits = 0x64806480  # 1024 + 128
        return _pair_op("sub", tile, _lop3(word, 0x00FF00FF, bits, AND_XOR), bits)
    # Eight bits don't fit the mantissa: 128 + the low seven, less 128 or, of a negative number, 256.
    low = _lop3(word, 0x007F007F, 0x43004300, AND_OR)
    sign = _lop3(word, 0x00800080, 0x43004300, AND_OR)
    return _asm_int(f"sub.{tile.letters}x2 $0, $1, $2;", low, sign)


def _fp8_pair(tile: Tile, word: Any) -> Any:
    """Return the float8_e4m3fn numbers of bytes 1 and 3 as floats; a product makes their exponents right, exactly."""
    form = FORMS[tile.letters]
    sign = arith.andi(word, _int(0x80008000))
    bits = _asm_int(
        f"lop3.b32 $0, $1, {form['fp8_mask'] * 0x10001}, $2, {AND_OR};", _shifted(word, form["fp8_shift"]), sign
    )
    return _pair_op("mul", tile, bits, form["fp8_power"] * 0x10001)


def _pair_op(op: str, tile: Tile, pair: Any, bits: int) -> Any:
    return _asm_int(f"{op}.{tile.letters}x2 $0, $1, $2;", pair, _int(bits))


def _lop3(word: Any, mask: int, bits: int, table: int) -> Any:
    return _asm_int(f"lop3.b32 $0, $1, {mask}, {bits}, {table};", word)


def _permuted(low: Any, high: Any, selector: int) -> Any:
    return _asm_int(f"prmt.b32 $0, $1, $2, {selector};", low, high)


def _shifted(word: Any, by: int) -> Any:
    """Return a word shifted right; left by a negative number."""
    if by == 0:
        return word
    return arith.shrui(word, _int(by)) if by > 0 else arith.shli(word, _int(-by))


def _mma(tile: Tile, sums: list[Any], left: list[Any], right: list[Any]) -> list[Any]:
    f32 = ir.F32Type.get()
    found = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*left, *right, *sums],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{tile.letters}.{tile.letters}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        asm_dialect=0,
        has_side_effects=True,
    )
    return [llvm.extractvalue(f32, found, [i]) for i in range(4)]


def _asm_int(text: str, *words: Any) -> Any:
    i32 = ir.IntegerType.get_signless(32)
    constraints = ",".join(["=r"] + ["r"] * len(words))
    return llvm.inline_asm(i32, list(words), text, constraints, asm_dialect=0, has_side_effects=False)


def _read_scale(tile: Tile, ref: Any, group: int, row: int, lane: _Lane) -> Any:
    size = utils.bytewidth(ir.MemRefType(ref.type).element_type)
    return _load_float(ref, size, (group * tile.outputs + row) * size, lane.first(tile))


def _load_float(ref: Any, size: int, start: int, index: Any) -> Any:
    """Return a float32, or a bfloat16 of two bytes, that lies `start` bytes and `index` entries from a reference's."""
    address = _offset(utils.memref_ptr(ref), _add(_mul(index, size), start))
    if size == 4:
        return llvm.load(ir.F32Type.get(), address)
    short = llvm.load(ir.IntegerType.get_signless(16), address)
    word = arith.extui(ir.IntegerType.get_signless(32), short)
    return arith.bitcast(ir.F32Type.get(), arith.shli(word, _int(16)))


def _load(base: Any, offset: Any, start: int) -> Any:
    return llvm.load(ir.IntegerType.get_signless(32), _offset(_offset(base, offset), start))


def _load_pair(base: Any, offset: Any, start: int) -> tuple[Any, Any]:
    i32 = ir.IntegerType.get_signless(32)
    pair = llvm.load(ir.VectorType.get((2,), i32), _offset(_offset(base, offset), start), alignment=8)
    return llvm.extractelement(pair, _int(0)), llvm.extractelement(pair, _int(1))


def _store(address: Any, value: Any, size: int, letters: str, seen: Any) -> None:
    flag = arith.extui(ir.IntegerType.get_signless(32), seen)
    narrow = f".reg .b16 v; cvt.rn.{letters}.f32 v, $1; @p st.global.b16 [$0], v;" if size == 2 else "@p st.global.f32 [$0], $1;"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, value, flag],
        f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; {narrow} }}",
        "l,f,r",
        asm_dialect=0,
        has_side_effects=True,
    )


def _offset(pointer: Any, by: Any) -> Any:
    """Return a pointer some bytes on; `by` is an int or an i32."""
    return utils.getelementptr(pointer, [by], ir.IntegerType.get_signless(8))


def _int(value: int) -> Any:
    value = value - (1 << 32) if value >= 1 << 31 else value
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _float(value: float) -> Any:
    return mgpu.c(value, ir.F32Type.get())


def _add(a: Any, b: Any) -> Any:
    if isinstance(b, int):
        return arith.addi(a, _int(b)) if b else a
    return arith.addi(a, b)


def _mul(a: Any, by: int) -> Any:
    return arith.muli(a, _int(by))


def _fma(a: Any, b: Any, c: Any) -> Any:
    text = "fma.rn.f32 $0, $1, $2, $3;"
    return llvm.inline_asm(ir.F32Type.get(), [a, b, c], text, "=f,f,f,f", asm_dialect=0, has_side_effects=False)
