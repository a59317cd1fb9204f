"""The instructions of one GPU thread that attention of integers is made of, beside those of the quantized product.

A module of functions, as `gpu_words` is, so that a test can run what is written in them on NumPy arrays.
"""

from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.quantized_matmul.gpu_words import (
    add,
    as_float,
    as_word,
    both,
    carried,
    differ,
    either,
    fma,
    less,
    number,
    onward,
    pair,
    picked,
    plus,
    pointer,
    quotient,
    read,
    real,
    remainder,
    right,
    several,
    thread,
    times,
    uncarried,
    width,
)  # fmt: skip
from pallas_kernels.quantized_matmul.gpu_words import meet as meet_cluster
from pallas_kernels.quantized_matmul.gpu_words import product as multiplied

__all__ = [
    "add", "as_float", "as_word", "both", "carried", "differ", "either", "fma", "less", "meet_cluster", "multiplied",
    "number", "onward", "picked", "plus", "pointer", "quotient", "read", "real", "remainder", "right", "several",
    "thread", "times", "uncarried", "width",
]  # fmt: skip


def keep_words(address: Any, words: list[Any]) -> None:
    """Write two or four words to an address of whole 8 or 16 bytes."""
    kind = ir.VectorType.get((len(words),), _i32())
    together = llvm.mlir_undef(kind)
    for i, word in enumerate(words):
        together = llvm.insertelement(together, word, number(i))
    llvm.store(together, address, alignment=4 * len(words))


def write_words(address: Any, words: list[Any], wanted: Any) -> None:
    """Write one, two or four words to global memory where `wanted`."""
    store = f"st.global.{_several(len(words))} [$0], {_names(2, len(words))};"
    _store(f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p {store} }}", "l", address, wanted, *words)


def of_block(block: Any, address: Any) -> Any:
    """Return where in a cluster's shared memory a block has what is at that address of one's own: a word."""
    at = llvm.ptrtoint(_i32(), address)
    return _asm(_i32(), "mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", at, block)


def send_words(address: Any, words: list[Any]) -> None:
    """Write one, two or four words to a cluster's shared memory, at an address that `of_block` gave."""
    _store(f"st.shared::cluster.{_several(len(words))} [$0], {_names(1, len(words))};", "r", address, *words)


def _several(count: int) -> str:
    return "b32" if count == 1 else f"v{count}.b32"


def _names(first: int, count: int) -> str:
    return "{" + ", ".join(f"${i}" for i in range(first, first + count)) + "}"


def _store(text: str, address_kind: str, address: Any, *words: Any) -> None:
    constraints = ",".join([address_kind, *["r"] * len(words), "~{memory}"])
    llvm.inline_asm(
        ir.Type.parse("!llvm.void"), [address, *words], text, constraints, asm_dialect=0, has_side_effects=True
    )


def write_part(address: Any, word: Any, size: int, wanted: Any) -> None:
    """Write the lowest 1 or 2 bytes of a word to global memory where `wanted`."""
    text = f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.global.b{8 * size} [$0], $2; }}"
    if size == 2:
        text = "{ .reg .pred p; .reg .b16 v; setp.ne.b32 p, $1, 0; cvt.u16.u32 v, $2; @p st.global.b16 [$0], v; }"
    _store(text, "l", address, wanted, word)


def integer_product(sums: list[Any] | None, left: list[Any], right: list[Any]) -> list[Any]:
    """Return sums [16, 8], or zeros, plus left [16, 32] times right [32, 8], signed bytes: mma.m16n8k32."""
    i32 = _i32()
    found = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4),
        [*left, *right, *(sums or [number(0)] * 4)],
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        asm_dialect=0,
        has_side_effects=True,  # all threads of the warp take part: nothing may move it into a branch
    )
    return [llvm.extractvalue(i32, found, [i]) for i in range(4)]


def halves_of(codes: Any) -> tuple[Any, Any]:
    """Return four float8_e4m3fn numbers as float16: two words of two."""
    i32 = _i32()
    text = (
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.rn.f16x2.e4m3x2 $0, low; cvt.rn.f16x2.e4m3x2 $1, high; }"
    )
    found = _asm(llvm.StructType.get_literal([i32] * 2), text, "=r,=r,r", codes)
    return llvm.extractvalue(i32, found, [0]), llvm.extractvalue(i32, found, [1])


def to_float(word: Any) -> Any:
    """Return a signed number as a float."""
    return arith.sitofp(ir.F32Type.get(), word)


def pair_of(low: Any, high: Any) -> Any:
    """Return two floats as bfloat16, in a word."""
    return pair("bf16", low, high)


def half_pair_of(low: Any, high: Any) -> Any:
    """Return two floats as float16, in a word."""
    return pair("f16", low, high)


def floats(array: Any) -> list[Any]:
    """Return all floats that a thread has of an array, in the order of its registers."""
    counts = [ir.VectorType(register.type).shape[0] for register in array.registers.flat]
    return [
        vector.extract(register, dynamic_position=[], static_position=[i])
        for register, count in zip(array.registers.flat, counts, strict=True)
        for i in range(count)
    ]


def product(a: Any, b: Any) -> Any:
    """Return a * b of floats."""
    return arith.mulf(a, b)


def minus(a: Any, b: Any) -> Any:
    """Return a - b of floats."""
    return arith.subf(a, b)


def higher(a: Any, b: Any) -> Any:
    """Return the greater of two floats, of NaN and another the other."""
    return _asm(ir.F32Type.get(), "max.f32 $0, $1, $2;", "=f,f,f", a, b)


def smaller(a: Any, b: Any) -> Any:
    """Return the smaller of two floats, NaN where one is."""
    return arith.minimumf(a, b)


def larger(a: Any, b: Any) -> Any:
    """Return the larger of two floats, NaN where one is."""
    return arith.maximumf(a, b)


def magnitude(a: Any) -> Any:
    """Return |a| of a float."""
    return _asm(ir.F32Type.get(), "abs.f32 $0, $1;", "=f,f", a)


def exp2(a: Any) -> Any:
    """Return 2 ** a."""
    return _asm(ir.F32Type.get(), "ex2.approx.ftz.f32 $0, $1;", "=f,f", a)


def divided(a: Any, b: Any) -> Any:
    """Return a / b, rounded once."""
    return _asm(ir.F32Type.get(), "div.rn.f32 $0, $1, $2;", "=f,f,f", a, b)


def within(a: Any, most: float) -> Any:
    """Return a float no further from 0 than `most`."""
    return arith.minimumf(arith.maximumf(a, real(-most)), real(most))


def signed_bytes(values: list[Any]) -> Any:
    """Return up to four floats of at most 127 as signed bytes of a word, rounded to the nearest, and to even."""
    found = number(0)
    for i, value in enumerate(values):
        byte = both(_asm(_i32(), "cvt.rni.s32.f32 $0, $1;", "=r,f", value), 0xFF)
        found = either(found, right(byte, -8 * i))
    return found


def eight_bits(values: list[Any]) -> Any:
    """Return up to four floats as float8_e4m3fn, in a word."""
    text = "{ .reg .b16 v; cvt.rn.satfinite.e4m3x2.f32 v, $2, $1; cvt.u32.u16 $0, v; }"
    values = values + [real(0.0)] * (len(values) % 2)
    found = number(0)
    for i in range(0, len(values), 2):
        found = either(found, right(_asm(_i32(), text, "=r,f,f", *values[i : i + 2]), -8 * i))
    return found


def log2(a: Any) -> Any:
    """Return the logarithm of a to base 2."""
    return _asm(ir.F32Type.get(), "lg2.approx.ftz.f32 $0, $1;", "=f,f", a)


def inverse(a: Any) -> Any:
    """Return 1 / a."""
    return _asm(ir.F32Type.get(), "rcp.approx.ftz.f32 $0, $1;", "=f,f", a)


def above(a: Any, b: float) -> Any:
    """Return whether a > b, of floats: a flag for `select`."""
    return arith.cmpf(arith.CmpFPredicate.OGT, a, real(b))


def take(a: Any, b: Any) -> Any:
    """Return a - b of words."""
    return arith.subi(a, b)


def lesser(a: Any, b: Any) -> Any:
    """Return the lesser of two signed words."""
    return arith.minsi(a, b)


def greater(a: Any, b: Any) -> Any:
    """Return the greater of two signed words."""
    return arith.maxsi(a, b)


def below(a: Any, b: Any) -> Any:
    """Return whether a < b, as unsigned words: a flag for `select`."""
    return arith.cmpi(arith.CmpIPredicate.ult, a, b)


def any_of(a: Any, b: Any) -> Any:
    """Return whether one of two flags is set."""
    return arith.ori(a, b)


def all_of(a: Any, b: Any) -> Any:
    """Return whether both of two flags are set."""
    return arith.andi(a, b)


def shifted(a: Any, by: Any) -> Any:
    """Return a word shifted right by another, of 0..31."""
    return arith.shrui(a, by)


def select(flag: Any, a: Any, b: Any) -> Any:
    """Return a where the flag is set, else b."""
    return arith.select(flag, a, b)


def neighbour(a: Any, distance: int) -> Any:
    """Return the float of the thread whose number differs in the bits of `distance`."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
    return llvm.inline_asm(ir.F32Type.get(), [a], text, "=f,f", asm_dialect=0, has_side_effects=True)


def highest(a: Any) -> Any:
    """Return the greatest of a warp's unsigned words."""
    text = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return llvm.inline_asm(_i32(), [a], text, "=r,r", asm_dialect=0, has_side_effects=True)


def meet() -> None:
    """Wait for all threads of the block."""
    mgpu.warpgroup_barrier()


def _i32() -> Any:
    return ir.IntegerType.get_signless(32)


def _asm(kind: Any, text: str, constraints: str, *inputs: Any) -> Any:
    return llvm.inline_asm(kind, list(inputs), text, constraints, asm_dialect=0, has_side_effects=False)
