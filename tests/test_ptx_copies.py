"""What runs a GPU's kernels on NumPy: copies of boxes, and the matrix instructions."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from ptx_programs import WAIT, program, run

from pallas_kernels.ptx.launch import Launch, Tensor, read
from pallas_kernels.ptx.memory import Wrong, swizzled
from pallas_kernels.ptx.parse import parse
from pallas_kernels.ptx.run import Compiled, execute
from pallas_kernels.ptx.translate import Code

BF16 = ml_dtypes.bfloat16
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


def test_which_bits_of_an_address_a_swizzle_turns():
    """Swizzle<3,4,3>, <2,4,3> and <1,4,3>: bits 4 and up, by bits 7 and up."""
    at = np.array([16, 128, 256, 512, 128 + 16, 896])
    np.testing.assert_array_equal(swizzled(at, 128), [16, 144, 288, 576, 128, 1008])
    np.testing.assert_array_equal(swizzled(at, 64), [16, 144, 288, 512, 128, 944])
    np.testing.assert_array_equal(swizzled(at, 32), [16, 144, 256, 512, 128, 912])
    np.testing.assert_array_equal(swizzled(at, 16), at)
