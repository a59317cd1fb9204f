"""int8 weights against activations whose groups of inputs have a scale each, in LLVM IR."""

from jaxinfer.ops.cpu_kernels_call import Job, Kernel
from jaxinfer.ops.cpu_kernels_ir import Code, Value
from jaxinfer.ops.cpu_kernels_vectors import (
    ENTRY_BYTES,
    LANES,
    add_product,
    dot_entries,
    entry_kind,
    int8_scale,
    int_lanes,
    load,
    tiles,
    to_int8,
    weight_entries,
)

_X_ROWS = (8, 4, 2, 1)  # rows of x that meet a row of the weight together
_FIRST = 16  # int32 entries in which the sum of a group lies ready: in the first, the others zero


def int8_groups_kernel(isa: str, group: int) -> Kernel:
    """Return `sum_g (x_g . w_g) * scale_g * scale`: x comes in float32, each `group` of it is rounded to int8.

    `group` is a multiple of 16. Sums are int32 within a group and float32, lane by lane, over the groups.
    """
    unsigned = isa == "avx512_vnni"  # its instruction takes w + 128: a group's sum starts at -128 * sum(x)
    kind = entry_kind(isa)
    widths, left = [], group
    for lanes in int_lanes(isa):
        widths += [lanes] * (left // (4 * lanes))
        left %= 4 * lanes
    places = [4 * sum(widths[:n]) for n in range(len(widths))]

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * I * ENTRY_BYTES[kind] + M * (I // group) * (4 + 4 * _FIRST)

    def parts(code: Code, job: Job, m: Value) -> tuple[Value, Value, Value]:
        """Return row m of x in int8, its scales, and what its groups' sums start at."""
        groups = job.I // group
        after = code.at(job.workspace, job.M * job.I, kind)
        firsts = code.at(after, job.M * groups + m * groups * _FIRST, "i32")
        return code.at(job.workspace, m * job.I, kind), code.at(after, m * groups, "i32"), firsts

    def prepare(code: Code, job: Job) -> None:
        with code.loop(code.zero, job.M) as m:
            row, scales, firsts = parts(code, job, m)
            with code.loop(code.zero, job.I // group) as g:
                x = code.at(job.operands[0], m * job.I + g * group, "float")
                scale = int8_scale(code, x, code.constant(group, "i64"))
                code.store(scale, code.at(scales, g, "float"))
                total = code.variable(0, f"<{LANES} x i32>")
                for i, lanes in tiles(code, code.zero, code.constant(group, "i64"), (LANES,)):
                    values = to_int8(code, load(code, x, i, "float", lanes), scale, kind)
                    code.store(values, code.at(row, g * group + i, kind))
                    if unsigned:
                        total.set(total.get() + code.cast("sext", values, total.type))
                if unsigned:
                    first = code.at(firsts, g * _FIRST, "i32")
                    code.store(code.constant(0, f"<{_FIRST} x i32>"), first)
                    code.store(code.sum(total.get()) * -128, first)

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        with code.loop(start, stop) as o:
            w = code.at(job.operands[1], o * job.I)
            scale = load(code, job.operands[2], o, "float", 1)
            for m, M in tiles(code, code.zero, job.M, _X_ROWS):
                xs = [parts(code, job, m + k) for k in range(M)]
                totals = [{n: code.variable(0.0, f"<{n} x float>") for n in dict.fromkeys(widths)} for _ in xs]
                with code.loop(code.zero, job.I // group) as g:
                    dots = [{} for _ in xs]
                    for place, lanes in zip(places, widths, strict=True):
                        part = weight_entries(code, isa, w, g * group + place, 4 * lanes)
                        for dot, (row, _, firsts) in zip(dots, xs, strict=True):
                            if lanes not in dot:
                                begins = unsigned and not dot
                                zero = code.constant(0, f"<{lanes} x i32>")
                                dot[lanes] = load(code, firsts, g * _FIRST, "i32", lanes) if begins else zero
                            x = load(code, row, g * group + place, kind, 4 * lanes)
                            dot[lanes] = dot_entries(code, isa, dot[lanes], part, x)
                    for dot, total, (_, scales, _) in zip(dots, totals, xs, strict=True):
                        s = load(code, scales, g, "float", 1)
                        for lanes, value in dot.items():
                            floats = code.cast("sitofp", value, total[lanes].type)
                            add_product(code, total[lanes], floats, code.splat(s, lanes))
                for k, total in enumerate(totals):
                    y, *rest = (code.sum(t.get()) for t in total.values())
                    for part in rest:
                        y = y + part
                    code.store(y * scale, code.at(job.out, (m + k) * job.O + o, "float"))

    return Kernel(3, workspace, prepare, rows)
