"""What the CPU kernels share, in LLVM IR: loops over vectors, dot products of bytes and of floats, rounding to int8."""

from collections.abc import Iterator

from jaxinfer.ops.cpu_kernels_ir import Code, Value, Variable

ENTRY_BYTES = {"i8": 1, "i16": 2}
_AHEAD = 2048  # bytes from what is read of a weight to what is asked for
LANES = 16  # of float arithmetic, which LLVM splits where registers are narrower


def whole(code: Code, start: Value, stop: Value, step: int) -> Iterator[Value]:
    """Write the body of a loop over the whole steps between start and stop."""
    with code.loop(start, rounded_down(start, stop, step), step) as i:
        yield i


def rounded_down(start: Value, stop: Value, step: int) -> Value:
    """Return where the whole steps from start end, at or before stop."""
    return start + (stop - start) // step * step


def tiles(code: Code, start: Value, stop: Value, sizes: tuple[int, ...]) -> Iterator[tuple[Value, int]]:
    """Write a body once for each size, largest first: a loop over whole tiles of it, then what is left."""
    for size in sizes:
        for i in whole(code, start, stop, size):
            yield i, size
        start = rounded_down(start, stop, size)


def int_lanes(isa: str) -> tuple[int, ...]:
    """Return the lanes of int32 sums: the widest vector first, then its halves for what is left of a row."""
    return {"avx512_vnni": (16, 8, 4), "avx2": (8, 4), "neon_dotprod": (4,)}[isa]


def load(code: Code, pointer: Value, index: Value | int, kind: str, lanes: int) -> Value:
    """Return `lanes` entries at an index; one is a scalar."""
    return code.load(code.at(pointer, index, kind), f"<{lanes} x {kind}>" if lanes > 1 else kind)


def read_weight(code: Code, pointer: Value, index: Value, count: int) -> Value:
    """Return `count` bytes of a weight that is read in order, and ask for those some way after them.

    What a processor fetches by itself comes too late, and hardly ever where two rows are read together.
    """
    ahead = code.at(code.at(pointer, index), _AHEAD)
    code.call("void", "llvm.prefetch.p0", ahead, *(code.constant(n, "i32") for n in (0, 3, 1)))  # to read; keep; data
    return load(code, pointer, index, "i8", count)


def weight_entries(code: Code, isa: str, pointer: Value, index: Value, count: int) -> Value:
    """Return int8 entries of a weight in the form that `dot_entries` takes; with AVX-512 they are w + 128."""
    entries, kind = read_weight(code, pointer, index, count), entry_kind(isa)
    if isa == "avx512_vnni":
        return entries ^ -128
    return code.cast("sext", entries, f"<{count} x {kind}>") if kind != "i8" else entries


def load_float(code: Code, pointer: Value, index: Value | int, kind: str, lanes: int) -> Value:
    """Return `lanes` entries of kind "float" or "half" as floats."""
    value = load(code, pointer, index, kind, lanes)
    return value if kind == "float" else code.cast("fpext", value, value.type.replace(kind, "float"))


def add_product(code: Code, total: Variable, a: Value, b: Value) -> None:
    """Add `a * b` to a float variable, rounded once."""
    total.set(fma(code, a, b, total.get()))


def fma(code: Code, a: Value, b: Value, c: Value) -> Value:
    """Return `a * b + c`, rounded once."""
    return code.call(a.type, f"llvm.fma.{_suffix(a)}", a, b, c)


def maximum(code: Code, a: Value, b: Value) -> Value:
    """Return the larger, entry by entry; NaN where one is."""
    return code.call(a.type, f"llvm.maximum.{_suffix(a)}", a, b)


def largest(code: Code, vector: Value) -> Value:
    """Return the largest entry; NaN where one is."""
    return code.call("float", f"llvm.vector.reduce.fmaximum.{_suffix(vector)}", vector)


def dot_bytes(code: Code, isa: str, total: Value, w: Value, x: Value, *, narrow: bool = False) -> Value:
    """Return `total` plus sums of four neighbouring products of bytes; with AVX-512 w is unsigned.

    `narrow`: w is 0..15, and lane j must hold bytes 4j..4j+3; otherwise AVX2 may put a product in any lane.
    """
    if isa == "avx512_vnni":  # as text, because LLVM changed its intrinsic's types
        return code.assembly(total.type, "vpdpbusd $3, $2, $0", "=v,0,v,v", total, w, x)
    if isa == "neon_dotprod":
        return code.call(total.type, "llvm.aarch64.neon.sdot.v4i32.v16i8", total, w, x)
    lanes = total.lanes
    if narrow:  # pairs of products are at most 2 * 15 * 128: they fit 16 bits
        wide, multiply = _pair_products(lanes)
        name = "llvm.x86.avx2.pmadd.ub.sw" if lanes == 8 else "llvm.x86.ssse3.pmadd.ub.sw.128"
        return total + code.call(total.type, multiply, code.call(wide, name, w, x), code.constant(1, wide))
    return _dot_wide(code, total, *(code.cast("sext", v, f"<{4 * lanes} x i16>") for v in (w, x)))


def dot_entries(code: Code, isa: str, total: Value, w: Value, x: Value) -> Value:
    """Return what `dot_bytes` does of entries of the kind that `entry_kind` names."""
    return dot_bytes(code, isa, total, w, x) if entry_kind(isa) == "i8" else _dot_wide(code, total, w, x)


def _dot_wide(code: Code, total: Value, w: Value, x: Value) -> Value:
    lanes = total.lanes
    _, multiply = _pair_products(lanes)
    for half in (range(2 * lanes), range(2 * lanes, 4 * lanes)):
        total = total + code.call(total.type, multiply, *(code.shuffle(v, list(half)) for v in (w, x)))
    return total


def entry_kind(isa: str) -> str:
    """Return in what integers activations are kept: bytes, or, where no instruction multiplies those, two bytes each.

    Widened once, and not wherever they meet a row of the weight, they make eight rows a third faster.
    """
    return "i16" if isa == "avx2" else "i8"


def _pair_products(lanes: int) -> tuple[str, str]:
    """Return AVX2's vector of two bytes an entry for `lanes` sums, and its instruction that adds pairs of products."""
    return f"<{2 * lanes} x i16>", "llvm.x86.avx2.pmadd.wd" if lanes == 8 else "llvm.x86.sse2.pmadd.wd"


def dot_floats(code: Code, a: Value, kind: str, b: Value | None, size: Value) -> Value:
    """Return the sum of `size` products of a, of kind "float" or "half", and of b; or of a alone."""
    sums = {LANES: code.variable(0.0, f"<{LANES} x float>"), 1: code.variable(0.0, "float")}
    for i, lanes in tiles(code, code.zero, size, (LANES, 1)):
        value = load_float(code, a, i, kind, lanes)
        if b is None:
            sums[lanes].set(sums[lanes].get() + value)
        else:
            add_product(code, sums[lanes], value, load(code, b, i, "float", lanes))
    return code.sum(sums[LANES].get()) + sums[1].get()


def int8_scale(code: Code, x: Value, size: Value) -> Value:
    """Return the largest magnitude of `size` floats over 127, and next to nothing where all are zero; keep a NaN."""
    found = {LANES: code.variable(0.0, f"<{LANES} x float>"), 1: code.variable(1e-30, "float")}
    for i, lanes in tiles(code, code.zero, size, (LANES, 1)):
        value = load(code, x, i, "float", lanes)
        magnitude = code.call(value.type, f"llvm.fabs.{_suffix(value)}", value)
        found[lanes].set(maximum(code, found[lanes].get(), magnitude))
    return maximum(code, largest(code, found[LANES].get()), found[1].get()) / 127.0


def to_int8(code: Code, x: Value, scale: Value, kind: str = "i8") -> Value:
    """Return x / scale as int8, halves to even, in integers of a kind."""
    ratio = x / (code.splat(scale, x.lanes) if x.lanes > 1 else scale)
    nearest = code.call(x.type, f"llvm.rint.{_suffix(x)}", ratio)
    integer = code.cast("fptosi", nearest, x.type.replace("float", "i32"))
    return code.cast("trunc", integer, x.type.replace("float", kind))


def exp(code: Code, x: Value) -> Value:
    """Return e to the power of x, which is at most 0, within 2 units in the last place; NaN of NaN."""

    def number(value: float) -> Value:
        return code.constant(value, x.type)

    x = maximum(code, x, number(-87.0))
    # Added to 1.5 * 2^23, a number is a whole one, in the low bits.
    shifted = fma(code, x, number(1.4426950408889634), number(12582912.0))
    whole = shifted - 12582912.0
    r = fma(code, whole, number(-0.693359375), x)  # ln 2 in two parts, of which the first times `whole` is exact
    r = fma(code, whole, number(2.12194440e-4), r)
    y = number(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
        y = fma(code, y, r, number(c))
    power = code.cast("bitcast", shifted, x.type.replace("float", "i32")) * (1 << 23) + (127 << 23)
    return y * code.cast("bitcast", power, x.type)


def _suffix(value: Value) -> str:
    return f"v{value.lanes}f32" if value.lanes > 1 else "f32"
