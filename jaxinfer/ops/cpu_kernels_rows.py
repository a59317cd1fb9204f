"""The products themselves, in LLVM IR: int8 x int8, and float32 or per-group int8 against quantized weights.

All of them read the weight row after row, as it lies in memory: several at a time came at less than half the speed.
"""

from jaxinfer.ops.cpu_kernels_call import Job, Kernel
from jaxinfer.ops.cpu_kernels_ir import Code, Value
from jaxinfer.ops.cpu_kernels_vectors import (
    ENTRY_BYTES,
    LANES,
    add_product,
    dot_bytes,
    dot_entries,
    dot_floats,
    entry_kind,
    int8_scale,
    int_lanes,
    load,
    load_float,
    read_weight,
    rounded_down,
    tiles,
    to_int8,
    weight_entries,
    whole,
)

_INT8_ROWS, _X_ROWS = (8, 4, 2, 1), (4, 1)  # rows of x that meet a row of the weight together
_RUN = 32  # entries of a row whose 4-bit values share 16 bytes


def int8_kernel(isa: str, *, floats: bool) -> Kernel:
    """Return int8 x int8 -> int32; with `floats`, x comes in float32, its rows are rounded, and the result scaled."""
    unsigned = isa == "avx512_vnni"  # its instruction takes w + 128: 128 * sum(x) is taken off at the end
    kind = entry_kind(isa)
    copied = floats or kind != "i8"

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * 8 + M * I * ENTRY_BYTES[kind] if copied else M * 8

    def parts(code: Code, job: Job) -> tuple[Value, Value, Value]:
        sums, scales = job.workspace, code.at(job.workspace, job.M * 4)
        return (code.at(job.workspace, job.M * 8) if copied else job.operands[0]), sums, scales

    def prepare(code: Code, job: Job) -> None:
        x8, sums, scales = parts(code, job)
        with code.loop(code.zero, job.M) as m:
            row = code.at(x8, m * job.I, kind)
            if floats:
                x = code.at(job.operands[0], m * job.I, "float")
                scale = int8_scale(code, x, job.I)
                code.store(scale, code.at(scales, m, "float"))
                for i, lanes in tiles(code, code.zero, job.I, (LANES, 1)):
                    code.store(to_int8(code, load(code, x, i, "float", lanes), scale, kind), code.at(row, i, kind))
            elif copied:
                x = code.at(job.operands[0], m * job.I)
                for i, lanes in tiles(code, code.zero, job.I, (LANES, 1)):
                    entries = load(code, x, i, "i8", lanes)
                    code.store(code.cast("sext", entries, entries.type.replace("i8", kind)), code.at(row, i, kind))
            if unsigned:
                totals = {LANES: code.variable(0, f"<{LANES} x i32>"), 1: code.variable(0, "i32")}
                for i, lanes in tiles(code, code.zero, job.I, (LANES, 1)):
                    entries = code.cast("sext", load(code, row, i, "i8", lanes), totals[lanes].type)
                    totals[lanes].set(totals[lanes].get() + entries)
                code.store((code.sum(totals[LANES].get()) + totals[1].get()) * 128, code.at(sums, m, "i32"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        x8, sums, scales = parts(code, job)
        with code.loop(start, stop) as o:
            for m, M in tiles(code, code.zero, job.M, _INT8_ROWS):
                xs = [code.at(x8, (m + k) * job.I, kind) for k in range(M)]
                for k, total in enumerate(_int8_dots(code, isa, xs, code.at(job.operands[1], o * job.I), job.I)):
                    if unsigned:
                        total = total - load(code, sums, m + k, "i32", 1)
                    if floats:
                        total = code.cast("sitofp", total, "float") * load(code, scales, m + k, "float", 1)
                        total = total * load(code, job.operands[2], o, "float", 1)
                    code.store(total, code.at(job.out, (m + k) * job.O + o, total.type))

    return Kernel(3 if floats else 2, workspace, prepare, rows)


def _int8_dots(code: Code, isa: str, xs: list[Value], w: Value, I: Value) -> list[Value]:
    """Return each x . w; with AVX-512 each x . (w + 128)."""
    unsigned, kind = isa == "avx512_vnni", entry_kind(isa)
    singles, totals, start = [code.variable(0, "i32") for _ in xs], [], code.zero
    for lanes in int_lanes(isa):
        folded = [code.fold(total.get()) for total in totals] or [0] * len(xs)
        totals = [code.variable(value, f"<{lanes} x i32>") for value in folded]
        for i in whole(code, start, I, 4 * lanes):
            part = weight_entries(code, isa, w, i, 4 * lanes)
            for x, total in zip(xs, totals, strict=True):
                total.set(dot_entries(code, isa, total.get(), part, load(code, x, i, kind, 4 * lanes)))
        start = rounded_down(start, I, 4 * lanes)
    with code.loop(start, I) as i:
        entry = code.cast("sext", load(code, w, i, "i8", 1), "i32")
        entry = entry + 128 if unsigned else entry
        for x, single in zip(xs, singles, strict=True):
            single.set(single.get() + entry * code.cast("sext", load(code, x, i, kind, 1), "i32"))
    return [code.sum(total.get()) + single.get() for total, single in zip(totals, singles, strict=True)]


def weight_only_kernel(qtype: str, isa: str, *, scale: str, offset: bool) -> Kernel:
    """Return float32 x (code * scale + offset) with float32 sums: scales multiply the sum of each group."""

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * G * 4

    def prepare(code: Code, job: Job) -> None:
        if not offset:
            return
        size = job.I // job.G
        with code.loop(code.zero, job.M * job.G) as group:
            x = code.at(job.operands[0], group * size, "float")
            code.store(dot_floats(code, x, "float", None, size), code.at(job.workspace, group, "float"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        size = job.I // job.G
        multiply = _int8_group if qtype == "int8" else _nibble_group
        with code.loop(start, stop) as o:
            w = code.at(job.operands[1], o * job.I if qtype == "int8" else o * job.I // 2)
            scales = code.at(job.operands[2], o * job.G, scale)
            for m, M in tiles(code, code.zero, job.M, _X_ROWS):
                xs = [code.at(job.operands[0], (m + k) * job.I, "float") for k in range(M)]
                totals = [(code.variable(0.0, f"<{LANES} x float>"), code.variable(0.0, "float")) for _ in xs]
                with code.loop(code.zero, job.G) as g:
                    s = load_float(code, scales, g, scale, 1)
                    sums = multiply(code, qtype, isa, xs, w, g * size, (g + 1) * size)
                    for (total, single), (vector, rest) in zip(totals, sums, strict=True):
                        add_product(code, total, vector, code.splat(s, LANES))
                        if rest:
                            add_product(code, single, rest, s)
                for k, (total, single) in enumerate(totals):
                    y = code.sum(total.get()) + single.get()
                    if offset:
                        offsets = code.at(job.operands[3], o * job.G, scale)
                        group_sums = code.at(job.workspace, (m + k) * job.G, "float")
                        y = y + dot_floats(code, offsets, scale, group_sums, job.G)
                    code.store(y, code.at(job.out, (m + k) * job.O + o, "float"))

    return Kernel(4 if offset else 3, workspace, prepare, rows)


def _int8_group(code, qtype, isa, xs, w, start, stop):
    """Return the products of one group with each x, as a vector to be summed and a scalar."""
    sizes = (4 * LANES, LANES, 1) if len(xs) == 1 else (LANES, 1)  # one row needs several sums that don't wait
    sums = [{n: code.variable(0.0, f"<{n} x float>" if n > 1 else "float") for n in sizes} for _ in xs]
    for i, lanes in tiles(code, start, stop, sizes):
        entries = code.cast("sitofp", read_weight(code, w, i, lanes), sums[0][lanes].type)
        for x, total in zip(xs, sums, strict=True):
            add_product(code, total[lanes], entries, load(code, x, i, "float", lanes))
    if len(xs) == 1:
        wide = sums[0][4 * LANES].get()
        sums[0][LANES].set(sums[0][LANES].get() + code.fold(code.fold(wide)))
    return [(total[LANES].get(), total[1].get()) for total in sums]


def _nibble_group(code, qtype, isa, xs, w, start, stop):
    """Return the products of one group with each x, as a vector to be summed."""
    sums = [[code.variable(0.0, f"<{LANES} x float>") for _ in range(2)] for _ in xs]
    with code.loop(start, stop, _RUN) as i:
        for half, entries in enumerate(_nibbles(code, qtype, isa, load(code, w, i // 2, "i8", LANES))):
            for x, total in zip(xs, sums, strict=True):
                add_product(code, total[half], entries, load(code, x, i + LANES * half, "float", LANES))
    return [(low.get() + high.get(), None) for low, high in sums]


def _nibbles(code: Code, qtype: str, isa: str, packed: Value) -> tuple[Value, Value]:
    """Return the low and the high nibbles of 16 bytes as floats."""
    kind = f"<{LANES} x float>"
    if isa == "avx512_vnni":  # one instruction looks 16 lanes up in a table of 16, by their low 4 bits
        first = 8 if qtype == "int4" else 0
        codes = ", ".join(f"float {code.operand(float((n + first) % 16 - first), 'float')}" for n in range(16))
        table, wide = code.constant(f"<{codes}>", kind), code.cast("zext", packed, f"<{LANES} x i32>")
        return tuple(code.call(kind, "llvm.x86.avx512.permvar.sf.512", table, n) for n in (wide, wide >> 4))
    if qtype == "int4":
        return tuple(code.cast("sitofp", (n ^ 8) - 8, kind) for n in (packed & 15, packed >> 4))
    return tuple(code.cast("uitofp", n, kind) for n in (packed & 15, packed >> 4))


def q4_kernel(qtype: str, isa: str, *, scale: str, offset: bool, runs: int) -> Kernel:
    """Return 4-bit weights against x rounded to int8 by 32 entries; `runs` of 32 share a scale, 4 meaning 4, 8, ..."""

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * I * 2 + M * G * 4

    def parts(code: Code, job: Job, m: Value) -> list[Value]:
        """Return row m of x: what meets low nibbles, what meets high ones, four scales and sums a run, group sums."""
        half, row = job.M * job.I // 2, m * job.I // 2
        places = [code.at(job.workspace, half * n + row) for n in range(4)]
        return [*places, code.at(job.workspace, half * 4 + m * job.G * 4)]

    def prepare(code: Code, job: Job) -> None:
        size = job.I // job.G
        with code.loop(code.zero, job.M) as m:
            *halves, scales, eights, sums = parts(code, job, m)
            with code.loop(code.zero, job.G) as g:
                group_sum = code.variable(0.0, "float")
                with code.loop(g * size, (g + 1) * size, _RUN) as i:
                    x = code.at(job.operands[0], m * job.I + i, "float")
                    s = int8_scale(code, x, code.constant(_RUN, "i64"))
                    total = code.constant(0, "<4 x i32>")
                    for n, place in enumerate(halves):
                        values = to_int8(code, load(code, x, LANES * n, "float", LANES), s)
                        code.store(values, code.at(place, i // 2))
                        total = dot_bytes(code, isa, total, code.constant(1, "<16 x i8>"), values, narrow=True)
                    code.store(code.splat(s, 4), code.at(scales, i // 2))
                    code.store(total * -8, code.at(eights, i // 2))  # int4 counts from 8 below the nibble
                    group_sum.set(group_sum.get() + s * code.cast("sitofp", code.sum(total), "float"))
                code.store(group_sum.get(), code.at(sums, g, "float"))

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        run_bytes = 16 * runs if runs < 4 else job.I // job.G // 2
        with code.loop(start, stop) as o:
            w, row = code.at(job.operands[1], o * job.I // 2), code.at(job.operands[2], o * job.G, scale)
            for m, M in tiles(code, code.zero, job.M, _X_ROWS):
                xs = [parts(code, job, m + k) for k in range(M)]
                totals, begin, end = [], code.zero, job.I // 2
                for lanes in int_lanes(isa):
                    folded = [code.fold(total.get()) for total in totals] or [0.0] * M
                    totals = [code.variable(value, f"<{lanes} x float>") for value in folded]
                    for p in whole(code, begin, end, 4 * lanes):
                        wide = _scales_of(code, row, p // run_bytes, scale, lanes, runs)
                        packed = read_weight(code, w, p, 4 * lanes)
                        packed = packed ^ -120 if qtype == "int4" else packed  # 0x88: -8..7 becomes 0..15
                        nibbles = packed & 15, packed >> 4
                        for (low, high, scales, eights, _), total in zip(xs, totals, strict=True):
                            dot = code.constant(0, f"<{lanes} x i32>")
                            if qtype == "int4":
                                dot = load(code, code.at(eights, p), 0, "i32", lanes)
                            for n, x in zip(nibbles, (low, high), strict=True):
                                dot = dot_bytes(code, isa, dot, n, load(code, x, p, "i8", 4 * lanes), narrow=True)
                            x_scales = load(code, code.at(scales, p), 0, "float", lanes)
                            add_product(code, total, code.cast("sitofp", dot, total.type), wide * x_scales)
                    begin = rounded_down(begin, end, 4 * lanes)
                for k, total in enumerate(totals):
                    y = code.sum(total.get())
                    if offset:
                        y = y + dot_floats(code, code.at(job.operands[3], o * job.G, scale), scale, xs[k][-1], job.G)
                    code.store(y, code.at(job.out, (m + k) * job.O + o, "float"))

    return Kernel(4 if offset else 3, workspace, prepare, rows)


def _scales_of(code: Code, row: Value, group: Value, kind: str, lanes: int, runs: int) -> Value:
    """Return the scales of the runs in one vector of weights, each four times: a run is four lanes."""
    count = max(1, lanes // 4 // runs)
    scales = load_float(code, row, group, kind, count)
    return code.splat(scales, lanes) if count == 1 else code.shuffle(scales, [n * count // lanes for n in range(lanes)])
