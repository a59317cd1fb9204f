"""What runs a GPU's kernels on NumPy: small programs in PTX, against what the PTX ISA says of their instructions."""

import ml_dtypes
import numpy as np
import pytest
from ptx_programs import SAY, lines, run

from pallas_kernels.ptx.memory import Wrong

LANES = np.arange(32)
BF16 = ml_dtypes.bfloat16


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


def test_two_warps_that_write_different_things_to_one_place_are_refused():
    with pytest.raises(Wrong, match="two warps write to one place"):
        run("st.global.b32 [%rd0], %r0;", [], [np.empty(32, np.int32)], threads=64)
    run("st.global.b32 [%rd0], 7;", [], [np.empty(32, np.int32)], threads=64)  # the same
