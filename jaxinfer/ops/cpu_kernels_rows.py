"""The products themselves, in LLVM IR: int8 x int8, and float32 or per-group int8 against quantized weights."""

from collections.abc import Iterator

from jaxinfer.ops.cpu_kernels_call import Job, Kernel
from jaxinfer.ops.cpu_kernels_ir import Code, Value, Variable

_TILE = (4, 1)  # rows of the weight, and rows of x, that are multiplied together
_FLOATS = 16  # lanes of float arithmetic, which LLVM splits where registers are narrower
RUN = 32  # entries of a row whose 4-bit values share 16 bytes


def int8_kernel(isa: str, *, floats: bool) -> Kernel:
    """Return int8 x int8 -> int32; with `floats`, x comes in float32, is rounded row by row, and the result is scaled."""
    unsigned = isa == "avx512_vnni"  # the instruction takes w + 128, and 128 * sum(x) is taken off at the end

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * 8 + M * I if floats else M * 8

    def parts(code: Code, job: Job) -> tuple[Value, Value, Value]:
        sums, scales = job.workspace, code.at(job.workspace, job.M * 4)
        return (code.at(job.workspace, job.M * 8) if floats else job.operands[0]), sums, scales

    def prepare(code: Code, job: Job) -> None:
        x8, sums, scales = parts(code, job)
        with code.loop(zero(code), job.M) as m:
            row = code.at(x8, m * job.I)
            if floats:
                x = code.at(job.operands[0], m * job.I, "float")
                scale = _scale_of(code, x, job.I)
                code.store(scale, code.at(scales, m, "float"))
                for i, lanes in _tiles(code, zero(code), job.I, (_FLOATS, 1)):
                    code.store(_round(code, _load(code, x, i, "float", lanes), scale), code.at(row, i))
            if unsigned:
                total, single = code.variable(0, "<16 x i32>"), code.variable(0, "i32")
                for i, lanes in _tiles(code, zero(code), job.I, (_FLOATS, 1)):
                    target = total if lanes > 1 else single
                    target.set(target.get() + code.cast("sext", _load(code, row, i, "i8", lanes), target.type))
                code.store((code.sum(total.get()) + single.get()) * 128, code.at(sums, m, "i32"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        x8, sums, scales = parts(code, job)
        for o, O, m, M in _pairs(code, start, stop, job.M):
            ws = [code.at(job.operands[1], (o + k) * job.I) for k in range(O)]
            xs = [code.at(x8, (m + k) * job.I) for k in range(M)]
            for (k, n), total in _int8_dots(code, isa, xs, ws, job.I).items():
                if unsigned:
                    total = total - code.load(code.at(sums, m + k, "i32"), "i32")
                if floats:
                    total = code.cast("sitofp", total, "float") * code.load(code.at(scales, m + k, "float"), "float")
                    total = total * code.load(code.at(job.operands[2], o + n, "float"), "float")
                code.store(total, code.at(job.out, (m + k) * job.O + o + n, total.type))

    return Kernel(3 if floats else 2, workspace, prepare, rows)


def _int8_dots(code: Code, isa: str, xs: list[Value], ws: list[Value], I: Value) -> dict[tuple[int, int], Value]:
    """Return each x . w; where the instruction wants it unsigned, each x . (w + 128)."""
    singles = {(k, n): code.variable(0, "i32") for k in range(len(xs)) for n in range(len(ws))}
    start, totals = zero(code), {}
    for lanes in _halvings(isa):
        totals = {
            key: code.variable(code.fold(totals[key].get()) if totals else 0, f"<{lanes} x i32>") for key in singles
        }
        for i in _whole(code, start, I, 4 * lanes):
            loaded = [_load(code, w, i, "i8", 4 * lanes) for w in ws]
            if isa == "avx512_vnni":
                loaded = [w ^ -128 for w in loaded]
            for k, x in enumerate(xs):
                x = _load(code, x, i, "i8", 4 * lanes)
                for n, w in enumerate(loaded):
                    totals[k, n].set(_dot(code, isa, totals[k, n].get(), w, x))
        start = _rounded_down(start, I, 4 * lanes)
    with code.loop(start, I) as i:
        loaded = [code.cast("sext", code.load(code.at(w, i), "i8"), "i32") for w in ws]
        for k, x in enumerate(xs):
            x = code.cast("sext", code.load(code.at(x, i), "i8"), "i32")
            for n, w in enumerate(loaded):
                singles[k, n].set(singles[k, n].get() + (w + 128 if isa == "avx512_vnni" else w) * x)
    return {key: code.sum(totals[key].get()) + single.get() for key, single in singles.items()}


def weight_only_kernel(qtype: str, isa: str, *, scale: str, offset: bool) -> Kernel:
    """Return float32 x (code * scale + offset) with float32 sums: scales multiply the sum of each group."""

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * G * 4

    def prepare(code: Code, job: Job) -> None:
        if not offset:
            return
        size = job.I // job.G
        with code.loop(zero(code), job.M * job.G) as group:
            x = code.at(job.operands[0], group * size, "float")
            code.store(_dot_floats(code, x, "float", None, size), code.at(job.workspace, group, "float"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        size = job.I // job.G
        for o, O, m, M in _pairs(code, start, stop, job.M):
            ws = [code.at(job.operands[1], (o + n) * (job.I if qtype == "int8" else job.I // 2)) for n in range(O)]
            xs = [code.at(job.operands[0], (m + k) * job.I, "float") for k in range(M)]
            keys = [(k, n) for k in range(M) for n in range(O)]
            totals = {key: code.variable(0.0, f"<{_FLOATS} x float>") for key in keys}
            singles = {key: code.variable(0.0, "float") for key in keys}
            with code.loop(zero(code), job.G) as g:
                vectors, rest = _group_dots(code, qtype, isa, xs, ws, g * size, (g + 1) * size)
                for k, n in keys:
                    s = _scale_at(code, job.operands[2], (o + n) * job.G + g, scale)
                    _add_product(code, totals[k, n], vectors[k, n].get(), code.splat(s, _FLOATS))
                    if rest:
                        _add_product(code, singles[k, n], rest[k, n].get(), s)
            for k, n in keys:
                total = code.sum(totals[k, n].get()) + singles[k, n].get()
                if offset:
                    sums = code.at(job.workspace, (m + k) * job.G, "float")
                    total = total + _dot_floats(
                        code, _part(code, job.operands[3], (o + n) * job.G, scale), scale, sums, job.G
                    )
                code.store(total, code.at(job.out, (m + k) * job.O + o + n, "float"))

    return Kernel(4 if offset else 3, workspace, prepare, rows)


def _group_dots(code, qtype, isa, xs, ws, start, stop):
    keys = [(k, n) for k in range(len(xs)) for n in range(len(ws))]
    vectors = {key: code.variable(0.0, f"<{_FLOATS} x float>") for key in keys}
    if qtype != "int8":
        with code.loop(start, stop, RUN) as i:
            halves = [_nibbles(code, qtype, isa, code.load(code.at(w, i // 2), "<16 x i8>")) for w in ws]
            for k, x in enumerate(xs):
                for half in (0, 1):
                    part = _load(code, x, i + 16 * half, "float", 16)
                    for n in range(len(ws)):
                        _add_product(code, vectors[k, n], halves[n][half], part)
        return vectors, {}
    rest = {key: code.variable(0.0, "float") for key in keys}
    for i, lanes in _tiles(code, start, stop, (_FLOATS, 1)):
        kind = f"<{lanes} x float>" if lanes > 1 else "float"
        loaded = [code.cast("sitofp", _load(code, w, i, "i8", lanes), kind) for w in ws]
        for k, x in enumerate(xs):
            x = _load(code, x, i, "float", lanes)
            for n, w in enumerate(loaded):
                _add_product(code, (vectors if lanes > 1 else rest)[k, n], w, x)
    return vectors, rest


def _nibbles(code: Code, qtype: str, isa: str, packed: Value) -> tuple[Value, Value]:
    """Return the low and the high nibbles of 16 bytes as floats."""
    kind = f"<{_FLOATS} x float>"
    if isa == "avx512_vnni":  # one instruction looks 16 lanes up in a table of 16, by their low 4 bits
        first = 8 if qtype == "int4" else 0
        codes = ", ".join(f"float {code.operand(float((n + first) % 16 - first), 'float')}" for n in range(16))
        table, wide = code.constant(f"<{codes}>", kind), code.cast("zext", packed, "<16 x i32>")
        return tuple(code.call(kind, "llvm.x86.avx512.permvar.sf.512", table, n) for n in (wide, wide >> 4))
    if qtype == "int4":
        return tuple(code.cast("sitofp", (n ^ 8) - 8, kind) for n in (packed & 15, packed >> 4))
    return tuple(code.cast("uitofp", n, kind) for n in (packed & 15, packed >> 4))


def q4_kernel(qtype: str, isa: str, *, scale: str, offset: bool, runs: int) -> Kernel:
    """Return 4-bit weights against x rounded to int8 in groups of 32; `runs` of 32 share a scale, 4 meaning 4, 8, ..."""

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * I + M * I // 2 + M * G * 4

    def parts(job: Job, code: Code, m: Value) -> tuple[Value, Value, Value, Value]:
        """Return row m of x: what meets low nibbles, what meets high ones, scales four times each, sums of groups."""
        half, base = job.M * job.I // 2, job.workspace
        low, high = code.at(base, m * job.I // 2), code.at(base, half + m * job.I // 2)
        scales, sums = code.at(base, half * 2 + m * job.I // 2), code.at(base, half * 3 + m * job.G * 4)
        return low, high, scales, sums

    def prepare(code: Code, job: Job) -> None:
        size = job.I // job.G
        with code.loop(zero(code), job.M) as m:
            low, high, scales, sums = parts(job, code, m)
            with code.loop(zero(code), job.G) as g:
                group_sum = code.variable(0.0, "float")
                with code.loop(g * size, (g + 1) * size, RUN) as i:
                    x = code.at(job.operands[0], m * job.I + i, "float")
                    s = _scale_of(code, x, code.constant(RUN, "i64"))
                    total = code.constant(0, "<16 x i32>")
                    for half, place in enumerate((low, high)):
                        values = _round(code, _load(code, x, 16 * half, "float", 16), s)
                        code.store(values, code.at(place, i // 2))
                        total = total + code.cast("sext", values, total.type)
                    code.store(code.splat(s, 4), code.at(scales, i // 2))
                    group_sum.set(group_sum.get() + s * code.cast("sitofp", code.sum(total), "float"))
                code.store(group_sum.get(), code.at(sums, g, "float"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        for o, O, m, M in _pairs(code, start, stop, job.M):
            ws = [code.at(job.operands[1], (o + n) * (job.I // 2)) for n in range(O)]
            ss = [_part(code, job.operands[2], (o + n) * job.G, scale) for n in range(O)]
            xs = [parts(job, code, m + k) for k in range(M)]
            totals, begin, end = {}, zero(code), job.I // 2
            for lanes in _halvings(isa):
                kind, keys = f"<{lanes} x float>", [(k, n) for k in range(M) for n in range(O)]
                totals = {key: code.variable(code.fold(totals[key].get()) if totals else 0.0, kind) for key in keys}
                for p in _whole(code, begin, end, 4 * lanes):
                    group = p // (16 * runs) if runs < 4 else p // (job.I // job.G // 2)
                    wide = [_scales_at(code, s, group, scale, lanes, runs) for s in ss]
                    packed = [_load(code, w, p, "i8", 4 * lanes) for w in ws]
                    packed = [w ^ -120 for w in packed] if qtype == "int4" else packed  # 0x88: -8..7 becomes 0..15
                    for k, (low, high, scales, _) in enumerate(xs):
                        halves = [_load(code, side, p, "i8", 4 * lanes) for side in (low, high)]
                        x_scale = _load(code, code.at(scales, p), 0, "float", lanes)
                        for n, w in enumerate(packed):
                            dot = code.constant(0, f"<{lanes} x i32>")
                            for nibbles, x in zip((w & 15, w >> 4), halves, strict=True):
                                dot = _dot(code, isa, dot, nibbles, x, narrow=True)
                            _add_product(code, totals[k, n], code.cast("sitofp", dot, kind), wide[n] * x_scale)
                begin = _rounded_down(begin, end, 4 * lanes)
            for (k, n), total in totals.items():
                total, sums = code.sum(total.get()), xs[k][3]
                if qtype == "int4":
                    total = total - _dot_floats(code, ss[n], scale, sums, job.G) * 8.0
                if offset:
                    offsets = _part(code, job.operands[3], (o + n) * job.G, scale)
                    total = total + _dot_floats(code, offsets, scale, sums, job.G)
                code.store(total, code.at(job.out, (m + k) * job.O + o + n, "float"))

    return Kernel(4 if offset else 3, workspace, prepare, rows)


def _scales_at(code: Code, row: Value, group: Value, kind: str, lanes: int, runs: int) -> Value:
    """Return the scales of the runs in one vector of weights, each four times: a run is four lanes."""
    count = max(1, lanes // 4 // runs)
    scales = _load(code, _part(code, row, group, kind), 0, kind, count)
    scales = scales if kind == "float" else code.cast("fpext", scales, scales.type.replace(kind, "float"))
    return code.splat(scales, lanes) if count == 1 else code.shuffle(scales, [n * count // lanes for n in range(lanes)])


def _halvings(isa: str) -> tuple[int, ...]:
    """Return the lanes of int32 sums: the widest vector first, then its halves for what is left of a row."""
    return {"avx512_vnni": (16, 8, 4), "avx2": (8, 4), "neon_dotprod": (4,)}[isa]


def _dot(code: Code, isa: str, total: Value, w: Value, x: Value, *, narrow: bool = False) -> Value:
    """Return `total` plus sums of four neighbouring products of bytes; with AVX-512 w is unsigned.

    `narrow`: w is 0..15, and lane j must hold bytes 4j..4j+3; otherwise AVX2 may put a product in any lane.
    """
    if isa == "avx512_vnni":
        return code.assembly(total.type, "vpdpbusd $3, $2, $0", "=v,0,v,v", total, w, x)
    if isa == "neon_dotprod":
        return code.assembly(total.type, "sdot $0.4s, $2.16b, $3.16b", "=w,0,w,w", total, w, x)
    lanes = total.lanes
    wide, multiply = f"<{2 * lanes} x i16>", "llvm.x86.avx2.pmadd.wd" if lanes == 8 else "llvm.x86.sse2.pmadd.wd"
    if narrow:  # pairs of products are at most 2 * 15 * 128: they fit 16 bits
        name = "llvm.x86.avx2.pmadd.ub.sw" if lanes == 8 else "llvm.x86.ssse3.pmadd.ub.sw.128"
        return total + code.call(total.type, multiply, code.call(wide, name, w, x), code.constant(1, wide))
    for half in (range(2 * lanes), range(2 * lanes, 4 * lanes)):
        parts = [code.cast("sext", code.shuffle(v, list(half)), wide) for v in (w, x)]
        total = total + code.call(total.type, multiply, *parts)
    return total


def _scale_of(code: Code, x: Value, size: Value) -> Value:
    """Return the largest magnitude of `size` floats over 127, and next to nothing where all are zero; keep a NaN."""
    largest, single = code.variable(0.0, "<16 x float>"), code.variable(1e-30, "float")
    for i, lanes in _tiles(code, zero(code), size, (_FLOATS, 1)):
        target, suffix = (largest, "v16f32") if lanes > 1 else (single, "f32")
        magnitude = code.call(target.type, f"llvm.fabs.{suffix}", _load(code, x, i, "float", lanes))
        target.set(code.call(target.type, f"llvm.maximum.{suffix}", target.get(), magnitude))
    vector = code.call("float", "llvm.vector.reduce.fmaximum.v16f32", largest.get())
    return code.call("float", "llvm.maximum.f32", vector, single.get()) / 127.0


def _round(code: Code, x: Value, scale: Value) -> Value:
    """Return x / scale as int8, halves to even."""
    lanes = x.lanes
    ratio = x / (code.splat(scale, lanes) if lanes > 1 else scale)
    nearest = code.call(x.type, f"llvm.rint.{'v16f32' if lanes > 1 else 'f32'}", ratio)
    integer = code.cast("fptosi", nearest, x.type.replace("float", "i32"))
    return code.cast("trunc", integer, x.type.replace("float", "i8"))


def _dot_floats(code: Code, a: Value, kind: str, b: Value | None, size: Value) -> Value:
    """Return the sum of `size` products of a (float or half) and b, or of a alone."""
    total, single = code.variable(0.0, f"<{_FLOATS} x float>"), code.variable(0.0, "float")
    for i, lanes in _tiles(code, zero(code), size, (_FLOATS, 1)):
        target = total if lanes > 1 else single
        value = _load(code, a, i, kind, lanes)
        value = value if kind == "float" else code.cast("fpext", value, target.type)
        if b is None:
            target.set(target.get() + value)
        else:
            _add_product(code, target, value, _load(code, b, i, "float", lanes))
    return code.sum(total.get()) + single.get()


def _add_product(code: Code, total: Variable, a: Value, b: Value) -> None:
    suffix = f"v{a.lanes}f32" if a.lanes > 1 else "f32"
    total.set(code.call(total.type, f"llvm.fma.{suffix}", a, b, total.get()))


def _scale_at(code: Code, scales: Value, index: Value, kind: str) -> Value:
    scale = code.load(_part(code, scales, index, kind), kind)
    return scale if kind == "float" else code.cast("fpext", scale, "float")


def _part(code: Code, pointer: Value, index: Value | int, kind: str) -> Value:
    return code.at(pointer, index, kind)


def _load(code: Code, pointer: Value, index: Value | int, kind: str, lanes: int) -> Value:
    return code.load(code.at(pointer, index, kind), f"<{lanes} x {kind}>" if lanes > 1 else kind)


def zero(code: Code) -> Value:
    return code.constant(0, "i64")


def _rounded_down(start: Value, stop: Value, step: int) -> Value:
    return start + (stop - start) // step * step


def _whole(code: Code, start: Value, stop: Value, step: int) -> Iterator[Value]:
    """Write the body of a loop over the whole steps between start and stop."""
    with code.loop(start, _rounded_down(start, stop, step), step) as i:
        yield i


def _tiles(code: Code, start: Value, stop: Value, sizes: tuple[int, ...]) -> Iterator[tuple[Value, int]]:
    """Write a body once for each size, largest first: a loop over whole tiles of it, then what is left."""
    for size in sizes:
        for i in _whole(code, start, stop, size):
            yield i, size
        start = _rounded_down(start, stop, size)


def _pairs(code: Code, start: Value, stop: Value, M: Value) -> Iterator[tuple[Value, int, Value, int]]:
    """Write a body for tiles of rows of the weight, and inside it of x: the weight is read from memory once."""
    for o, O in _tiles(code, start, stop, _TILE):
        for m, K in _tiles(code, zero(code), M, _TILE):
            yield o, O, m, K
