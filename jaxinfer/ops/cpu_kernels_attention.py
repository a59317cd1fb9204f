"""Attention of few queries over a cache, in LLVM IR: an online softmax over tiles of slots (1805.02867)."""

from jaxinfer.ops.cpu_kernels_call import Job, Kernel
from jaxinfer.ops.cpu_kernels_ir import Code, Value
from jaxinfer.ops.cpu_kernels_vectors import (
    LANES,
    add_product,
    exp,
    largest,
    load,
    maximum,
    rounded_down,
    tiles,
)

_TILE = 64  # slots whose keys and values, at 64 entries a head, fit the first cache
_ROWS = (2, 1)  # queries that meet four keys together
_DOT = 8  # lanes of their products' sums, which then fit the registers of AVX2
_MASKED = -1e30
_EXTRA = 2  # entries of a share after the head's: the sum of its weights, and their peak


def attention_kernel(head_dim: int, parts: int) -> Kernel:
    """Return softmax attention of queries `[M, I, H]` over keys and values of M heads, `[.., .., S, H]`, in float32.

    The second operand, int32 `[M, I, 2]`, has the first slot that a query sees and the one after the last; what lies
    outside is never used, and a query that sees nothing gives 0. What any of the I queries sees is cut into `parts`
    equal parts, for threads to share; whoever finishes a head's last one merges them.
    """
    width = head_dim + _EXTRA

    def workspace(M: Value, I: Value, G: Value) -> Value:
        return M * 8 + M * I * (parts * width * 4)

    def prepare(code: Code, job: Job) -> None:
        with code.loop(code.zero, job.M) as m:
            code.store(code.zero, code.at(job.workspace, m, "i64"))  # parts that are finished

    def rows(code: Code, job: Job, start: Value, stop: Value) -> None:
        scores = code.reserve(f"[{_ROWS[0] * _TILE} x float]")
        with code.loop(start, stop) as item:
            m = item // parts
            q, bounds = code.at(job.operands[0], m * job.I * head_dim, "float"), _Bounds(code, job, m)
            k, v = (code.at(job.operands[n], m * job.G * head_dim, "float") for n in (2, 3))
            shares = code.at(code.at(job.workspace, job.M * 8), m * job.I * (parts * width), "float")
            own = code.at(shares, (item - m * parts) * job.I * width, "float")
            with code.loop(code.zero, job.I) as i:
                share = code.at(own, i * width, "float")
                for n in range(0, head_dim, LANES):
                    code.store(code.constant(0.0, f"<{LANES} x float>"), code.at(share, n, "float"))
                code.store(code.constant(0.0, "float"), code.at(share, head_dim, "float"))
                code.store(code.constant(_MASKED, "float"), code.at(share, head_dim + 1, "float"))
            first, last = bounds.of_all()
            size = ((last - first) // (8 * parts) + 1) * 8
            begin = first + (item - m * parts) * size
            with code.loop(begin, code.smaller(begin + size, last), _TILE) as s:
                end = code.smaller(code.smaller(s + _TILE, begin + size), last)
                for i, count in tiles(code, code.zero, job.I, _ROWS):
                    _scores(code, scores, code.at(q, i * head_dim, "float"), count, k, s, end, head_dim)
                    for n in range(count):
                        low, high = bounds.of(i + n)
                        low, high = code.larger(low, s), code.smaller(high, end)
                        with code.when(low < high):
                            share = code.at(own, (i + n) * width, "float")
                            _add(code, share, code.at(scores, n * _TILE, "float"), v, s, low, high, head_dim)
            finished = code.add_atomic(code.at(job.workspace, m, "i64"), 1)
            with code.when(finished.equals(parts - 1)):
                _merge(code, job, code.at(job.out, m * job.I * head_dim, "float"), shares, parts, head_dim)

    return Kernel(4, workspace, prepare, rows, parts, group_axis=2)


def _merge(code: Code, job: Job, out: Value, shares: Value, parts: int, H: int) -> None:
    """Write the attention that the parts of one head make together."""
    with code.loop(code.zero, job.I) as i:
        rows = [code.at(shares, (job.I * part + i) * (H + _EXTRA), "float") for part in range(parts)]
        peaks = [load(code, row, H + 1, "float", 1) for row in rows]
        peak = peaks[0]
        for other in peaks[1:]:
            peak = maximum(code, peak, other)
        total, sums = (
            code.variable(0.0, "float"),
            [code.variable(0.0, f"<{LANES} x float>") for _ in range(0, H, LANES)],
        )
        for row, own in zip(rows, peaks, strict=True):
            weight = exp(code, own - peak)
            add_product(code, total, load(code, row, H, "float", 1), weight)
            for n, value in enumerate(sums):
                add_product(code, value, load(code, row, n * LANES, "float", LANES), code.splat(weight, LANES))
        # The peak itself weighs 1: the sum is less only where nothing is seen.
        total = code.splat(maximum(code, total.get(), code.constant(1e-30, "float")), LANES)
        for n, value in enumerate(sums):
            code.store(value.get() / total, code.at(out, i * H + n * LANES, "float"))


class _Bounds:
    """Which slots the queries of one item see."""

    def __init__(self, code: Code, job: Job, m: Value):
        self.code, self.count = code, job.I
        self.at = code.at(job.operands[1], m * job.I * 2, "i32")

    def of(self, i: Value) -> tuple[Value, Value]:
        code = self.code
        return tuple(code.cast("sext", load(code, self.at, i * 2 + n, "i32", 1), "i64") for n in (0, 1))

    def of_all(self) -> tuple[Value, Value]:
        """Return the first slot that any query sees and the one after the last; the same where none sees any."""
        code = self.code
        first, last = code.variable(code.constant(1 << 31, "i64")), code.variable(code.zero)
        with code.loop(code.zero, self.count) as i:
            low, high = self.of(i)
            with code.when(low < high):
                first.set(code.smaller(first.get(), low))
                last.set(code.larger(last.get(), high))
        return code.smaller(first.get(), last.get()), last.get()


def _scores(code: Code, scores: Value, q: Value, count: int, k: Value, start: Value, stop: Value, H: int) -> None:
    """Write `q k^T` of `count` queries over the slots from start to stop."""
    fours = rounded_down(start, stop, 4)
    for first, last, size in ((start, fours, 4), (fours, stop, 1)):
        with code.loop(first, last, size) as s:
            keys = [code.at(k, (s + n) * H, "float") for n in range(size)]
            sums = [[code.variable(0.0, f"<{_DOT} x float>") for _ in keys] for _ in range(count)]
            for n in range(0, H, _DOT):
                entries = [load(code, key, n, "float", _DOT) for key in keys]
                for i, totals in enumerate(sums):
                    query = load(code, q, i * H + n, "float", _DOT)
                    for total, entry in zip(totals, entries, strict=True):
                        add_product(code, total, entry, query)
            for i, totals in enumerate(sums):
                row = [total.get() for total in totals]
                code.store(
                    _sums(code, row) if size == 4 else code.sum(row[0]),
                    code.at(scores, (s - start) + i * _TILE, "float"),
                )


def _sums(code: Code, vectors: list[Value]) -> Value:
    """Return the sum of each of four vectors of 8 lanes."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]

    def neighbours(a: Value, b: Value) -> Value:
        return code.shuffle(a, even, b) + code.shuffle(a, odd, b)

    return code.fold(neighbours(neighbours(*vectors[:2]), neighbours(*vectors[2:])))


def _add(code: Code, row: Value, scores: Value, v: Value, start: Value, low: Value, high: Value, H: int) -> None:
    """Add what the slots from low to high contribute to a share; the tile of scores begins at start."""
    masked = code.constant(_MASKED, "float")
    for begin, end in ((code.zero, low - start), (high - start, code.constant(_TILE, "i64"))):
        with code.loop(begin, end) as j:
            code.store(masked, code.at(scores, j, "float"))
    tile = [load(code, scores, n, "float", LANES) for n in range(0, _TILE, LANES)]
    highest = tile[0]
    for part in tile[1:]:
        highest = maximum(code, highest, part)
    total, before = (code.at(row, H + n, "float") for n in (0, 1))
    old = code.load(before, "float")
    peak = maximum(code, largest(code, highest), old)
    code.store(peak, before)
    shrink = exp(code, old - peak)
    sums = None
    for n, part in enumerate(tile):
        weights = exp(code, part - code.splat(peak, LANES))
        code.store(weights, code.at(scores, n * LANES, "float"))
        sums = weights if sums is None else sums + weights
    code.store(code.load(total, "float") * shrink + code.sum(sums), total)
    wide = code.splat(shrink, LANES)
    out = [code.variable(load(code, row, n, "float", LANES) * wide) for n in range(0, H, LANES)]
    with code.loop(low, high) as s:
        weight = code.splat(load(code, scores, s - start, "float", 1), LANES)
        for n, value in enumerate(out):
            add_product(code, value, weight, load(code, v, s * H + n * LANES, "float", LANES))
    for n, value in enumerate(out):
        code.store(value.get(), code.at(row, n * LANES, "float"))
