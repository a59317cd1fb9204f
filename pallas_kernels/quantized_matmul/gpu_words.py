"""The instructions of one GPU thread that the quantized product is made of: on words of 32 bits, floats and pointers.

`gpu_registers` says which word meets which through these functions alone, so that a test can run it on NumPy arrays in
place of registers.
"""

from typing import Any

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector


def number(value: int) -> Any:
    """Return a constant word."""
    return mgpu.c(value - (1 << 32) if value >= 1 << 31 else value, ir.IntegerType.get_signless(32))


def real(value: float) -> Any:
    """Return a constant float."""
    return mgpu.c(value, ir.F32Type.get())


def thread() -> Any:
    """Return the thread's number in its warpgroup, 0..127."""
    return arith.remui(utils.thread_idx(), number(128))


def add(a: Any, b: Any) -> Any:
    """Return a + b; `b` is a word or an int."""
    if isinstance(b, int):
        return arith.addi(a, number(b)) if b else a
    return arith.addi(a, b)


def times(a: Any, by: int) -> Any:
    """Return a * by."""
    return arith.muli(a, number(by))


def both(a: Any, b: Any) -> Any:
    """Return a & b; `b` is a word or an int."""
    return arith.andi(a, number(b) if isinstance(b, int) else b)


def either(a: Any, b: Any) -> Any:
    """Return a | b."""
    return arith.ori(a, b)


def differ(a: Any, b: Any) -> Any:
    """Return a ^ b; `b` is a word or an int."""
    return arith.xori(a, number(b) if isinstance(b, int) else b)


def right(a: Any, by: int) -> Any:
    """Return a word shifted right; left by a negative number."""
    if by == 0:
        return a
    return arith.shrui(a, number(by)) if by > 0 else arith.shli(a, number(-by))


def quotient(a: Any, by: int) -> Any:
    """Return a // by."""
    return arith.divui(a, number(by))


def remainder(a: Any, by: int) -> Any:
    """Return a % by."""
    return arith.remui(a, number(by))


def less(a: Any, b: int) -> Any:
    """Return whether a < b, as signed numbers: 1 or 0."""
    flag = arith.cmpi(arith.CmpIPredicate.slt, a, number(b))
    return arith.extui(ir.IntegerType.get_signless(32), flag)


def chosen(a: Any, mask: int, bits: int | Any, table: int) -> Any:
    """Return the bits that a table of three inputs chooses for those of `a`, `mask` and `bits`: lop3."""
    if isinstance(bits, int):
        return _word(f"lop3.b32 $0, $1, {mask}, {bits}, {table};", a)
    return _word(f"lop3.b32 $0, $1, {mask}, $2, {table};", a, bits)


def picked(low: Any, high: Any, selector: int) -> Any:
    """Return four of the eight bytes of two words, one for each digit of a hexadecimal selector."""
    return _word(f"prmt.b32 $0, $1, $2, {selector};", low, high)


def pairwise(op: str, letters: str, a: Any, b: Any) -> Any:
    """Return `sub` or `mul` of words of two floats each, "bf16" or "f16"; `b` is a word or an int."""
    return _word(f"{op}.{letters}x2 $0, $1, $2;", a, number(b) if isinstance(b, int) else b)


def pair_fma(letters: str, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c of words of two floats each, rounded once."""
    text = f"fma.rn.{letters}x2 $0, $1, $2, $3;"
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [a, b, c], text, "=r,r,r,r", asm_dialect=0, has_side_effects=False)


def pair(letters: str, low: Any, high: Any) -> Any:
    """Return two floats rounded to what the letters name, in a word."""
    text, i32 = f"cvt.rn.{letters}x2.f32 $0, $2, $1;", ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, [low, high], text, "=r,f,f", asm_dialect=0, has_side_effects=False)


def unpaired(letters: str, word: Any) -> tuple[Any, Any]:
    """Return the two floats of a word."""
    f32 = ir.F32Type.get()
    if letters == "bf16":
        return arith.bitcast(f32, right(word, -16)), arith.bitcast(f32, both(word, 0xFFFF0000))
    text = "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
    two = llvm.StructType.get_literal([f32, f32])
    found = llvm.inline_asm(two, [word], text, "=f,=f,r", asm_dialect=0, has_side_effects=False)
    return llvm.extractvalue(f32, found, [0]), llvm.extractvalue(f32, found, [1])


def fma(a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    text = "fma.rn.f32 $0, $1, $2, $3;"
    return llvm.inline_asm(ir.F32Type.get(), [a, b, c], text, "=f,f,f,f", asm_dialect=0, has_side_effects=False)


def plus(a: Any, b: Any) -> Any:
    """Return a + b of floats."""
    return arith.addf(a, b)


def product(letters: str, sums: list[Any], left: list[Any], right: list[Any]) -> list[Any]:
    """Return sums [16, 8] plus left [16, 16] times right [16, 8], as the warp's threads hold them: mma.m16n8k16."""
    f32 = ir.F32Type.get()
    found = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [*left, *right, *sums],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{letters}.{letters}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        asm_dialect=0,
        has_side_effects=True,  # all threads of the warp take part: nothing may move it into a branch
    )
    return [llvm.extractvalue(f32, found, [i]) for i in range(4)]


def pointer(ref: Any) -> Any:
    """Return the address of a reference's first byte."""
    return utils.memref_ptr(ref)


def width(ref: Any) -> int:
    """Return the bytes of a reference's entries."""
    return utils.bytewidth(ir.MemRefType(ref.type).element_type)


def onward(address: Any, by: Any) -> Any:
    """Return the address some bytes on; `by` is a word or an int."""
    return utils.getelementptr(address, [by], ir.IntegerType.get_signless(8))


def several(address: Any, count: int) -> list[Any]:
    """Return the 1, 2 or 4 words at an address, a multiple of their bytes."""
    i32 = ir.IntegerType.get_signless(32)
    found = llvm.load(ir.VectorType.get((count,), i32), address, alignment=4 * count)
    return [llvm.extractelement(found, number(i)) for i in range(count)]


def read(address: Any, size: int) -> Any:
    """Return the number at an address as a float: a float32 of 4 bytes or a bfloat16 of 2."""
    if size == 4:
        return llvm.load(ir.F32Type.get(), address)
    short = llvm.load(ir.IntegerType.get_signless(16), address)
    bits = arith.extui(ir.IntegerType.get_signless(32), short)
    return arith.bitcast(ir.F32Type.get(), right(bits, -16))


def keep(address: Any, value: Any) -> None:
    """Write a float to shared memory."""
    llvm.store(value, address)


def meet(seen: bool) -> None:
    """Wait for all threads of the cluster; what they kept before is `seen` after it, or nobody looks."""
    arrive = "release" if seen else "relaxed"  # a release waits for all that was written, outputs too
    text = f"barrier.cluster.arrive.{arrive}.aligned; barrier.cluster.wait.acquire.aligned;"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "~{memory}", asm_dialect=0, has_side_effects=True)


def show_copies() -> None:
    """Let the copies that the thread begins after it see what it has written to shared memory."""
    text = "fence.proxy.async.shared::cta;"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], text, "~{memory}", asm_dialect=0, has_side_effects=True)


def kept_by(block: int, address: Any) -> Any:
    """Return the float that a block of the cluster keeps at that address of its own shared memory."""
    text = f"{{ .reg .b32 a; mapa.shared::cluster.u32 a, $1, {block}; ld.shared::cluster.f32 $0, [a]; }}"
    at = llvm.ptrtoint(ir.IntegerType.get_signless(32), address)
    constraints = "=f,r,~{memory}"
    return llvm.inline_asm(ir.F32Type.get(), [at], text, constraints, asm_dialect=0, has_side_effects=True)


def write(address: Any, value: Any, size: int, letters: str, wanted: Any) -> None:
    """Write a float to global memory where `wanted`, as it is or, in 2 bytes, rounded to what the letters name."""
    if size == 2:
        write = f".reg .b16 v; cvt.rn.{letters}.f32 v, $1; @p st.global.b16 [$0], v;"
    else:
        write = "@p st.global.f32 [$0], $1;"
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [address, value, wanted],
        f"{{ .reg .pred p; setp.ne.b32 p, $2, 0; {write} }}",
        "l,f,r",
        asm_dialect=0,
        has_side_effects=True,
    )


def as_float(word: Any) -> Any:
    """Return the float that has the bits of a word."""
    return arith.bitcast(ir.F32Type.get(), word)


def as_word(value: Any) -> Any:
    """Return the bits of a float."""
    return arith.bitcast(ir.IntegerType.get_signless(32), value)


def carried(sums: list[Any]) -> mgpu.FragmentedArray:
    """Return some floats of each thread as an array that a loop can carry, `carrier(len(sums))` its layout."""
    one = ir.VectorType.get((1,), ir.F32Type.get())
    registers = np.array([vector.broadcast(one, value) for value in sums], dtype=object)
    layout = mgpu.WGStridedFragLayout((128 * len(sums),), 1)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def uncarried(sums: mgpu.FragmentedArray) -> list[Any]:
    """Return the floats of each thread that an array carries."""
    return [vector.extract(r, dynamic_position=[], static_position=[0]) for r in sums.registers.flat]


def _word(text: str, *words: Any) -> Any:
    constraints = ",".join(["=r"] + ["r"] * len(words))
    i32 = ir.IntegerType.get_signless(32)
    return llvm.inline_asm(i32, list(words), text, constraints, asm_dialect=0, has_side_effects=False)
