"""What runs a GPU's kernels on NumPy: small programs in PTX, against what the PTX ISA says of their instructions."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.ptx.launch import Launch, Tensor, read
from pallas_kernels.ptx.memory import Wrong, swizzled
from pallas_kernels.ptx.parse import parse
from pallas_kernels.ptx.run import Compiled, execute
from pallas_kernels.ptx.translate import Code

LANES = np.arange(32)
BF16 = ml_dtypes.bfloat16
KINDS = {"float32": "f32", "int32": "i32", "uint32": "i32", "bfloat16": "bf16", "int8": "i8", "uint64": "i64"}


def program(body: str, parameters: int = 4) -> str:
    given = ", ".join(f".param .u64 .ptr .align 256 k_param_{n}" for n in range(parameters))
    pointers = "".join(f"ld.param.b64 %rd{n}, [k_param_{n}];\n" for n in range(parameters))
    return f""".visible .entry k({given})
    .maxntid 128, 1, 1
    {{
    .reg .pred %p<9>; .reg .b16 %rs<19>; .reg .b32 %r<99>; .reg .b64 %rd<40>;
    .shared .align 16 .b8 shmem;
    {pointers}
    mov.u32 %r0, %tid.x;  // the thread
    mul.wide.u32 %rd20, %r0, 4;
    {body}
    ret;
    }}"""


def run(
    body,
    arrays,
    out,
    *,
    tensors=(),
    threads=32,
    grid=(1, 1, 1),
    cluster=(1, 1, 1),
    shared=4096,
    late=0.0,
    seed=0,
    changed=None,
):
    """Run a program on arrays; its parameters are the inputs, the outputs, and the tensors."""
    shapes = tuple((x.shape, KINDS[x.dtype.name]) for x in (*arrays, *out))
    parameters = (*range(len(shapes)), *((tuple(tensors),) if tensors else ()))
    text = program(body, len(shapes) + bool(tensors))
    text = text.replace(f"ld.param.b64 %rd{len(shapes)}, [", "mov.b64 %rd39, [") if tensors else text
    text = text.replace(f"mov.b64 %rd39, [k_param_{len(shapes)}]", f"mov.b64 %rd{len(shapes)}, k_param_{len(shapes)}")
    launch = Launch(grid, threads, cluster, shared, parameters, shapes)
    return execute(Compiled(Code.of(parse(text)), launch, changed or {}), arrays, out, late, seed)


def lines(instruction: str, inputs: int, kind: str = "b32") -> str:
    """Return a program that loads a number a lane of each input, does an instruction, and stores the result."""
    loads = "".join(
        f"add.s64 %rd2{n + 1}, %rd{n}, %rd20;\nld.global.b32 %r{n + 1}, [%rd2{n + 1}];\n" for n in range(inputs)
    )
    return f"{loads}\n{instruction}\nadd.s64 %rd30, %rd{inputs}, %rd20;\nst.global.{kind} [%rd30], %r9;\n"


def words(seed: int, *edges: int) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, 1 << 32, 32, dtype=np.uint32)
    found[: len(edges)] = np.array(edges, np.int64).astype(np.uint32)
    return found


def halves(x):
    return x.view(np.uint16).reshape(-1, 2)


def bf16s(x):
    return halves(x).view(BF16).astype(np.float64)


def signed(x):
    return x.view(np.int32).astype(np.int64)


INTEGERS = {
    "mul.hi.u32 %r9, %r1, %r2;": lambda a, b: (a.astype(np.uint64) * b) >> np.uint64(32),
    "mul.hi.s32 %r9, %r1, %r2;": lambda a, b: signed(a) * signed(b) >> 32,
    "mul.lo.s32 %r9, %r1, %r2;": lambda a, b: a.astype(np.uint64) * b,
    "cvt.u16.u32 %rs1, %r1; cvt.u16.u32 %rs2, %r2; mul.hi.u16 %rs3, %rs1, %rs2; cvt.u32.u16 %r9, %rs3;": (
        lambda a, b: ((a & 0xFFFF).astype(np.uint64) * (b & 0xFFFF)) >> np.uint64(16)
    ),
    "shl.b32 %r9, %r1, %r2;": lambda a, b: [int(x) << int(y) if y < 32 else 0 for x, y in zip(a, b, strict=True)],
    "shr.s32 %r9, %r1, %r2;": lambda a, b: [int(x) >> min(int(y), 31) for x, y in zip(signed(a), b, strict=True)],
    "shr.u32 %r9, %r1, %r2;": lambda a, b: [int(x) >> int(y) for x, y in zip(a, b, strict=True)],
    "bfe.s32 %r9, %r1, 5, 7;": lambda a, b: signed(a) << 52 >> 57,
    "bfe.u32 %r9, %r1, 5, 7;": lambda a, b: a >> 5 & 127,
    "min.relu.s32 %r9, %r1, %r2;": lambda a, b: np.maximum(np.minimum(signed(a), signed(b)), 0),
    "max.relu.s32 %r9, %r1, %r2;": lambda a, b: np.maximum(np.maximum(signed(a), signed(b)), 0),
    "lop3.b32 %r9, %r1, %r2, 255, 0xEA;": lambda a, b: (a & b) | 255,
    "lop3.b32 %r9, %r1, %r2, -128, 106;": lambda a, b: (a & b) ^ np.uint32(0xFFFFFF80),
    "prmt.b32 %r9, %r1, %r2, 0x7304;": lambda a, b: (
        (b & 255) | ((a & 255) << 8) | ((a >> 24) << 16) | (b & np.uint32(0xFF000000))
    ),
    "prmt.b32 %r9, %r1, %r2, 0x0008;": lambda a, b: (
        np.where(a & 128, 255, 0) | ((a & 255) << 8) | ((a & 255) << 16) | ((a & 255) << 24)
    ),
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, %r1, %r2, %p1;": lambda a, b: np.minimum(signed(a), signed(b)),
    "setp.lt.u32 %p1, %r1, %r2; @!%p1 mov.b32 %r1, %r2; mov.b32 %r9, %r1;": lambda a, b: np.where(a < b, a, b),
    "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r9, {%rs2, %rs1};": lambda a, b: (a >> 16) | (a << np.uint32(16)),
    "cvt.s64.s32 %rd35, %r1; shr.u64 %rd35, %rd35, 32; cvt.u32.u64 %r9, %rd35;": lambda a, b: signed(a) >> 32,
}


@pytest.mark.parametrize("instruction", INTEGERS)
def test_integers(instruction):
    counts = instruction.startswith("sh")
    a = words(0, 0, 1, -1, 1 << 31, 127, 128)
    b = (words(1) % 40).astype(np.uint32) if counts else words(1, -1, -1, 1, 1 << 31)
    (found,) = run(lines(instruction, 2), [a, b], [np.empty(32, np.uint32)])
    expected = np.asarray(INTEGERS[instruction](a, b)).astype(np.int64) & 0xFFFFFFFF
    np.testing.assert_array_equal(found, expected)


def nearest(x: np.ndarray) -> np.ndarray:
    """Return what is nearest in bfloat16, ties to even: by looking at both neighbours."""
    cut = (x.astype(np.float32).view(np.uint32) >> 16 << 16).view(np.float32)
    steps = [(cut.view(np.uint32) + np.uint32(n << 16)).view(np.float32) for n in (-1 & 0xFFFF, 0, 1)]
    errors = np.stack([np.abs(step.astype(np.float64) - x) for step in steps])
    odd = np.stack([step.view(np.uint32) >> 16 & 1 for step in steps])
    best = np.lexsort((odd, errors), axis=0)[0]
    return np.take_along_axis(np.stack(steps), best[None], 0)[0].astype(np.float64)


FLOATS = {
    "cvt.rn.bf16x2.f32 %r9, %r1, %r2;": lambda a, b: np.stack([nearest(x.view(np.float32)) for x in (b, a)], 1),
    "mul.bf16x2 %r9, %r1, %r2;": lambda a, b: nearest(bf16s(a) * bf16s(b)),
    "sub.bf16x2 %r9, %r1, %r2;": lambda a, b: nearest(bf16s(a) - bf16s(b)),
    "fma.rn.bf16x2 %r9, %r1, %r2, %r3;": lambda a, b, c: nearest(bf16s(a) * bf16s(b) + bf16s(c)),
}


@pytest.mark.parametrize("instruction", FLOATS)
def test_bfloat16_is_rounded_once(instruction):
    rng = np.random.default_rng(2)
    count = FLOATS[instruction].__code__.co_argcount
    if instruction.startswith("cvt"):  # ties, and what is next to them
        x = [rng.standard_normal(32).astype(np.float32) for _ in range(count)]
        x[0].view(np.uint32)[:] &= np.uint32(0xFFFF0000)
        x[0].view(np.uint32)[:] |= np.tile([0x8000, 0x8001, 0x7FFF, 0], 8).astype(np.uint32)
    else:
        x = [rng.standard_normal(64).astype(BF16) for _ in range(count)]
        # Products that are ties, and what is added is too small for float32 to see it: up, and down.
        for one, up, down in zip(x, (1.09375, 1.375, 2.0**-30), (1.0078125, 1.5, -(2.0**-30)), strict=False):
            one[:4] = up, down, -up, down
    x = [one.view(np.uint32) for one in x]
    (found,) = run(lines(instruction, count), x, [np.empty(32, np.uint32)])
    np.testing.assert_array_equal(bf16s(found), FLOATS[instruction](*x))


def test_numbers_that_are_none():
    a = np.array([np.nan, 1, np.nan, np.inf] * 8, np.float32)
    b = np.array([1, np.nan, np.nan, -np.inf] * 8, np.float32)
    out = [np.empty(32, np.float32)]
    (number,) = run(lines("max.f32 %r9, %r1, %r2;", 2), [a, b], out)
    (none,) = run(lines("max.NaN.f32 %r9, %r1, %r2;", 2), [a, b], out)
    np.testing.assert_array_equal(number, [1, 1, np.nan, np.inf] * 8)
    np.testing.assert_array_equal(none, [np.nan, np.nan, np.nan, np.inf] * 8)
    (nearest,) = run(lines("cvt.rni.s32.f32 %r9, %r1;", 1), [a + 0.5], [np.empty(32, np.int32)])
    np.testing.assert_array_equal(nearest, [0, 2, 0, 2**31 - 1] * 8)


def test_lanes_part_and_meet():
    """Each lane turns round as often as its number says; then all add up what their neighbours have."""
    body = """
    mov.b32 %r1, 0;
    $TURN: setp.ge.s32 %p1, %r1, %r0; @%p1 bra $DONE;
    add.s32 %r1, %r1, 1; bra.uni $TURN;
    $DONE: shfl.sync.bfly.b32 %r2|%p2, %r1, 1, 31, -1;
    add.s32 %r3, %r1, %r2;
    { .reg .pred P1; LAB: setp.gt.s32 P1, %r3, 60; @P1 bra DONE; add.s32 %r3, %r3, 100; bra LAB; DONE: }
    elect.sync %r4|%p3, -1; @%p3 add.s32 %r3, %r3, 1000;
    redux.sync.max.u32 %r5, %r3, 0xffffffff; add.s32 %r3, %r3, %r5;
    add.s64 %rd30, %rd0, %rd20; st.global.b32 [%rd30], %r3;
    """
    (found,) = run(body, [], [np.empty(32, np.int32)])
    both = LANES + (LANES ^ 1)
    both = np.where(both > 60, both, both + 100) + 1000 * (LANES == 0)
    np.testing.assert_array_equal(found, both + both.max())


def test_threads_that_have_ended_are_not_waited_for():
    body = """
    setp.ge.s32 %p1, %r0, 16; @%p1 ret;
    bar.sync 0;
    add.s64 %rd30, %rd0, %rd20; st.global.b32 [%rd30], %r0;
    """
    (found,) = run(body, [], [np.zeros(32, np.int32)])
    np.testing.assert_array_equal(found[:16], LANES[:16])
    assert (found[16:] != LANES[16:]).all()  # nobody wrote there


SAY = "cvt.u32.u64 %r1, %rd31; shl.b32 %r2, %r0, 2; add.s32 %r1, %r1, %r2;"
EXCHANGE = f"""
    mov.b64 %rd31, shmem; {SAY} xor.b32 %r3, %r1, 128;
    st.shared.b32 [%r1], %r0; BARRIER ld.shared.b32 %r4, [%r3];
    add.s64 %rd30, %rd0, %rd20; st.global.b32 [%rd30], %r4;
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_is_needed_for_what_another_warp_wrote(seed):
    out = [np.empty(64, np.int32)]
    right = np.arange(64) ^ 32
    (found,) = run(EXCHANGE.replace("BARRIER", "bar.sync 1, 64;"), [], out, threads=64, seed=seed)
    np.testing.assert_array_equal(found, right)
    (found,) = run(EXCHANGE.replace("BARRIER", ""), [], out, threads=64, seed=seed)
    assert (found != right).any()


def test_blocks_of_a_cluster_write_to_each_other():
    body = f"""
    mov.b64 %rd31, shmem; {SAY} mov.u32 %r5, %cluster_ctaid.x; xor.b32 %r6, %r5, 1;
    mapa.shared::cluster.u32 %r7, %r1, %r6; mad.lo.s32 %r8, %r5, 100, %r0;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    st.shared::cluster.b32 [%r7], {{%r8}};
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    ld.shared.b32 %r4, [%r1]; mov.u32 %r9, %ctaid.x; mul.wide.u32 %rd32, %r9, 128;
    add.s64 %rd30, %rd0, %rd20; add.s64 %rd30, %rd30, %rd32; st.global.b32 [%rd30], %r4;
    """
    (found,) = run(body, [], [np.empty((4, 32), np.int32)], grid=(4, 1, 1), cluster=(2, 1, 1))
    np.testing.assert_array_equal(found, np.array([[100], [0], [100], [0]]) + LANES)


WRONG = {
    "mad.lo.s64 %rd30, %rd20, 2, %rd0; st.global.b32 [%rd30], %r0;": "no array's",
    "add.s64 %rd30, %rd0, 2; st.global.b32 [%rd30], %r0;": "not aligned",
    "mov.b64 %rd31, shmem; ld.shared.b32 %r1, [%rd31+4096];": "outside the 4096 of shared memory",
    "st.global.b32 [%rd0], %r0;": None,  # of one warp: the last lane's
    "bar.sync 1, 64;": "all warps wait",
    "mov.b64 %rd31, shmem; mbarrier.arrive.expect_tx.shared.b64 %rd32, [%rd31], %r0;": "no barrier was made",
    "mov.b64 %rd31, shmem; cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%rd31], 128;"
    "cp.async.bulk.commit_group;": "ends before its copies",
    "setp.lt.s32 %p1, %r0, 16; @%p1 bra $A; shfl.sync.idx.b32 %r1, %r0, 0, 31, -1; ret; $A: bar.sync 0;": "all warps",
    "frobnicate.b32 %r1, %r2;": "not known",
    "shfl.sync.up.b32 %r1, %r0, 1, 0, -1;": "not known",
    "cvt.rmi.s32.f32 %r1, %r0;": "not known",
    "add.sat.s32 %r1, %r0, %r0;": "not known",
    "setp.lt.s32 %p1, %r0, 9; @%p1 bar.sync 0;": "not known",
}


@pytest.mark.parametrize("body", WRONG)
def test_what_no_gpu_would_do_is_refused(body):
    out = [np.empty(32, np.int32)]
    if WRONG[body] is None:
        run(body, [], out)
        return
    with pytest.raises((Wrong, NotImplementedError), match=WRONG[body]):
        run(body, [], out, late=1.0)


@pytest.mark.parametrize(
    ("fences", "right"),
    [
        ("fence.proxy.async.shared::cta;", True),
        ("@!%p2 bra $OVER; fence.proxy.async.shared::cta; $OVER:", False),
        ("", False),
    ],
)
def test_each_warp_fences_what_a_copy_reads(fences, right):
    """Warp 0 copies what both wrote; in the second case it alone has fenced, and nothing of warp 1 need be seen."""
    body = f"""
    mov.b64 %rd31, shmem; {SAY} st.shared.b32 [%r1], %r0; setp.lt.s32 %p2, %r0, 32; setp.eq.s32 %p1, %r0, 0;
    {fences} bar.sync 0;
    @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd0], [%rd31], 256;
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    if right:
        (found,) = run(body, [], [np.empty(64, np.int32)], threads=64)
        np.testing.assert_array_equal(found, np.arange(64))
        return
    for seed in range(4):  # whichever warp is the first
        with pytest.raises(Wrong, match=r"without fence\.proxy\.async"):
            run(body, [], [np.empty(64, np.int32)], threads=64, seed=seed)


def test_which_bits_of_an_address_a_swizzle_turns():
    """Swizzle<3,4,3>, <2,4,3> and <1,4,3>: bits 4 and up, by bits 7 and up."""
    at = np.array([16, 128, 256, 512, 128 + 16, 896])
    np.testing.assert_array_equal(swizzled(at, 128), [16, 144, 288, 576, 128, 1008])
    np.testing.assert_array_equal(swizzled(at, 64), [16, 144, 288, 512, 128, 944])
    np.testing.assert_array_equal(swizzled(at, 32), [16, 144, 256, 512, 128, 912])
    np.testing.assert_array_equal(swizzled(at, 16), at)


def test_two_warps_that_write_different_things_to_one_place_are_refused():
    with pytest.raises(Wrong, match="two warps write to one place"):
        run("st.global.b32 [%rd0], %r0;", [], [np.empty(32, np.int32)], threads=64)
    run("st.global.b32 [%rd0], 7;", [], [np.empty(32, np.int32)], threads=64)  # the same


COPY = """
    mov.b64 %rd31, shmem; cvt.u32.u64 %r1, %rd31; add.s32 %r2, %r1, 2048; elect.sync %r3|%p1, -1; mov.b32 %r4, 1;
    @%p1 mbarrier.init.shared.b64 [%r2], %r4;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 %rd32, [%r2], 512;
    mov.b32 %r5, COLUMN; mov.b32 %r6, ROW;
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd2, {%r5, %r6}], [%r2];
    mov.b32 %r7, 0; mov.b32 %r8, 100;
    WAIT
    shl.b32 %r10, %r0, 2; add.s32 %r11, %r1, %r10;
    ld.shared.b32 %r12, [%r11]; ld.shared.b32 %r13, [%r11+128];
    ld.shared.b32 %r14, [%r11+256]; ld.shared.b32 %r15, [%r11+384];
    add.s64 %rd30, %rd1, %rd20; st.global.b32 [%rd30], %r12; st.global.b32 [%rd30+128], %r13;
    st.global.b32 [%rd30+256], %r14; st.global.b32 [%rd30+384], %r15;
"""
WAIT = "{ .reg .pred P1; W: mbarrier.try_wait.parity.shared.b64 P1, [%r2], %r7, %r8; @P1 bra.uni D; bra.uni W; D: }"


@pytest.mark.parametrize("swizzle", [16, 128])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 0), (-1, 0), (3, 20)])
def test_a_copy_of_a_box(row, column, swizzle):
    """Four rows of 32: what is outside is zeros; in a swizzled tile chunks of 16 bytes change places."""
    x = np.arange(1, 8 * 32 + 1, dtype=np.int32).reshape(8, 32)
    tensor = Tensor(0, 0, (8, 32), (32, 1), (4, 32), 4, swizzle)
    body = COPY.replace("COLUMN", str(column)).replace("ROW", str(row)).replace("WAIT", WAIT)
    wide = np.zeros((20, 80), np.int32)
    wide[4:12, :32] = x
    box = wide[4 + row : 8 + row, column : column + 32]
    if swizzle == 128:
        chunks = box.reshape(4, 8, 4)
        box = np.stack([chunks[r][np.arange(8) ^ r] for r in range(4)]).reshape(4, 32)
    for late in (0.0, 1.0):
        (found,) = run(body, [x], [np.empty((4, 32), np.int32)], tensors=[tensor], late=late)
        np.testing.assert_array_equal(found, box)
    with pytest.raises(Wrong, match="before its copies have arrived"):  # a kernel that does not wait
        run(body.replace(WAIT, ""), [x], [np.empty((4, 32), np.int32)], tensors=[tensor], late=1.0)


def fragments(x: np.ndarray) -> np.ndarray:
    """Return the words `[4, 32]` of a matrix `[16, 2 n]` as the PTX ISA gives them to lanes: A of mma.m16n8."""
    n = x.shape[1] // 16 * 2 if x.dtype.itemsize == 2 else 4
    found = np.empty((4, 32, n), x.dtype)
    for register, lane, entry in itertools.product(range(4), range(32), range(n)):
        row, column = lane // 4 + 8 * (register % 2), lane % 4 * n + entry + 4 * n * (register // 2)
        found[register, lane, entry] = x[row, column]
    return found.view(np.uint32)[..., 0]


@pytest.mark.parametrize("kind", ["bf16", "s8"])
def test_mma(kind):
    rng = np.random.default_rng(0)
    depth, dtype = (16, BF16) if kind == "bf16" else (32, np.int8)
    a, b = (rng.integers(-9, 9, shape).astype(dtype) for shape in ((16, depth), (8, depth)))
    left = fragments(a)
    right = fragments(np.concatenate([b, b]))[[0, 2]]  # B's columns lie as A's first eight rows do
    loads = "".join(
        f"ld.global.b32 %r{10 + n}, [%rd30+{128 * n}];"
        if n < 4
        else f"ld.global.b32 %r{10 + n}, [%rd31+{128 * (n - 4)}];"
        for n in range(6)
    )
    shape = {"bf16": "m16n8k16.row.col.f32.bf16.bf16.f32", "s8": "m16n8k32.row.col.s32.s8.s8.s32"}[kind]
    body = f"""
    add.s64 %rd30, %rd0, %rd20; add.s64 %rd31, %rd1, %rd20; add.s64 %rd32, %rd2, %rd20; {loads}
    mov.b32 %r20, 0;
    mma.sync.aligned.{shape} {{%r1,%r2,%r3,%r4}}, {{%r10,%r11,%r12,%r13}}, {{%r14,%r15}}, {{%r20,%r20,%r20,%r20}};
    st.global.b32 [%rd32], %r1; st.global.b32 [%rd32+128], %r2;
    st.global.b32 [%rd32+256], %r3; st.global.b32 [%rd32+384], %r4;
    """
    (found,) = run(body, [left, right], [np.empty((4, 32), np.float32 if kind == "bf16" else np.int32)])
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    for register, lane in itertools.product(range(4), range(32)):
        assert found[register, lane] == expected[lane // 4 + 8 * (register // 2), lane % 4 * 2 + register % 2]


@pytest.mark.parametrize("turned", ["", ".trans"])
def test_matrices_of_halves(turned):
    """Lane 8 i + r says where row r of matrix i lies; lane l gets two of row l / 4, or of column l / 4."""
    x = np.arange(4 * 8 * 8, dtype=np.int32).astype(np.uint16).reshape(4, 8, 8)
    body = f"""
    mov.b64 %rd31, shmem; cvt.u32.u64 %r1, %rd31; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2;
    add.s64 %rd30, %rd0, %rd20; add.s64 %rd32, %rd1, %rd20;
    ld.global.b32 %r10, [%rd30]; ld.global.b32 %r11, [%rd30+128]; ld.global.b32 %r12, [%rd30+256];
    ld.global.b32 %r13, [%rd30+384];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {{%r10, %r11, %r12, %r13}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4{turned}.shared.b16 {{%r14, %r15, %r16, %r17}}, [%r3];
    st.global.b32 [%rd32], %r14; st.global.b32 [%rd32+128], %r15; st.global.b32 [%rd32+256], %r16;
    st.global.b32 [%rd32+384], %r17;
    """
    (found,) = run(body, [x.reshape(-1).view(np.uint32)], [np.empty((4, 32), np.uint32)])
    for i, lane in itertools.product(range(4), range(32)):
        row = (x[i].T if turned else x[i])[lane // 4]
        assert (found[i, lane] & 0xFFFF, found[i, lane] >> 16) == tuple(row[lane % 4 * 2 :][:2])


@pytest.mark.parametrize("late", [0.0, 1.0])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("swizzle", [128, 64, 32])
def test_wgmma_reads_tiles_as_copies_write_them(swizzle, turned, late):
    """A `[64, 16]`, of zeros and ones in registers, picks rows of B `[16, 8]`, which a copy put in shared memory."""
    rng = np.random.default_rng(0)
    width = swizzle // 2
    b = rng.standard_normal((width, 16) if turned else (8, width)).astype(BF16)
    a = np.zeros((64, 16), BF16)
    a[np.arange(64), np.arange(64) % 16] = 1
    left = np.stack([fragments(a[16 * w : 16 * w + 16]) for w in range(4)], 1).reshape(4, 128)
    store = np.ascontiguousarray(b.T if turned else b)
    tensor = Tensor(1, 0, store.shape, (store.shape[1], 1), store.shape, 2, swizzle)
    mode = {128: 1, 64: 2, 32: 3}[swizzle] << 62 | (8 * swizzle >> 4) << 32 | (1 << 16)
    loads = "".join(f"ld.global.b32 %r{10 + n}, [%rd30+{512 * n}];" for n in range(4))
    body = f"""
    mov.b64 %rd31, shmem; cvt.u32.u64 %r1, %rd31; add.s32 %r2, %r1, 2048; mov.b32 %r4, 1; mov.b32 %r5, 0;
    setp.eq.s32 %p1, %r0, 0; mov.b32 %r7, 0; mov.b32 %r8, 100;
    @%p1 mbarrier.init.shared.b64 [%r2], %r4;
    bar.sync 0;
    @%p1 mbarrier.arrive.expect_tx.shared.b64 %rd32, [%r2], {store.nbytes};
    @%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd3, {{%r5, %r5}}], [%r2];
    {WAIT}
    add.s64 %rd30, %rd0, %rd20; {loads}
    bfe.u64 %rd33, %rd31, 4, 14; or.b64 %rd33, %rd33, {mode};
    mov.b32 %r20, 0; mov.b32 %r21, 0; mov.b32 %r22, 0; mov.b32 %r23, 0;
    wgmma.fence.sync.aligned;
    {{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
      {{%r20,%r21,%r22,%r23}}, {{%r10,%r11,%r12,%r13}}, %rd33, p, 1, 1, {int(turned)}; }}
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.s64 %rd32, %rd2, %rd20;
    st.global.b32 [%rd32], %r20; st.global.b32 [%rd32+512], %r21; st.global.b32 [%rd32+1024], %r22;
    st.global.b32 [%rd32+1536], %r23;
    """
    out = [np.empty((4, 128), np.float32)]
    arguments = dict(tensors=[tensor], threads=128, late=late)
    (found,) = run(body, [left, store], out, **arguments)
    expected = (b[:8] if turned else b[:, :16]).astype(np.float32)  # [8, 16]
    for register, thread in itertools.product(range(4), range(128)):
        row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2)
        assert found[register, thread] == expected[thread % 4 * 2 + register % 2, row % 16]
    if late:
        with pytest.raises(Wrong, match="before its products are done"):
            run(body.replace("wgmma.wait_group.sync.aligned 0;", ""), [left, store], out, **arguments)


def test_an_array_that_a_kernel_changes_keeps_the_rest():
    x = np.arange(64, dtype=np.int32)
    body = "add.s64 %rd30, %rd0, %rd20; st.global.b32 [%rd30+64], -1;"
    (found,) = run(body, [x], [np.empty(64, np.int32)], changed={0: 0})
    np.testing.assert_array_equal(found, np.where((x >= 16) & (x < 48), -1, x))


def test_arrays_of_other_shapes_and_logs_of_other_forms_are_refused():
    launch = Launch((1, 1, 1), 32, (1, 1, 1), 0, (0,), (((32,), "i32"),))
    kernel = Compiled(Code.of(parse(program("", 1))), launch, {})
    with pytest.raises(ValueError, match=r"an array of \(3,\): the kernel was compiled for \(32,\)"):
        execute(kernel, [np.zeros(3, np.int32)], [])
    with pytest.raises(ValueError, match="no function of the host"):
        read("// -----// IR Dump Before A //----- //\nmodule {}\ngpu.launch_func\n")
    with pytest.raises(ValueError, match="shows no launch"):
        read("")
    with pytest.raises(ValueError, match=r"no \.entry"):
        parse("// nothing")
