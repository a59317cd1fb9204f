"""The copies of the GPU's quantized product, and what waits for them: one thread begins all of a step's at once.

Pallas' own copies have every thread arrive at a barrier, for each of them, and find their way through it.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, scf

from pallas_kernels.quantized_matmul import gpu_words as words
from pallas_kernels.quantized_matmul.gpu_plan import Plan
from pallas_kernels.quantized_matmul.gpu_tile import BANKS, LINE


def begin(ctx: Any, plan: Plan, refs: dict[str, Any], first: Any, start: Any, count: Any) -> None:
    """Fill the ring: with the block's `count` steps from `first` on, of outputs from `start` on."""
    i32 = ir.IntegerType.get_signless(32)
    surely = plan.steps - plan.each * (plan.splits - 1)
    with _one_thread():
        for slot in range(plan.stages + 1):
            nvvm.mbarrier_init(_barrier(refs, words.number(slot)).get_ptr(), words.number(1))
        nvvm.fence_mbarrier_init()
        words.show_copies()
        for step in range(min(plan.stages, plan.each)):
            at = words.add(first, step)
            if step < surely:
                copy(ctx, plan, refs, at, start, words.number(step))
                continue
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.sgt, count, arith.constant(i32, step))):
                copy(ctx, plan, refs, at, start, words.number(step))
        if plan.tile.whole:
            barrier = _barrier(refs, words.number(plan.stages))
            barrier.arrive_expect_tx(_bytes_of_scales(plan, refs))
            _copy_scales(ctx, plan, refs, words.number(0), start, words.number(0), barrier)
    mgpu.warpgroup_barrier()


def refill(ctx: Any, plan: Plan, refs: dict[str, Any], step: Any, first: Any, start: Any, count: Any) -> None:
    """Begin the copies of the step that has the slot of `step` next, if there is one, once all have read the slot."""
    after = words.add(step, plan.stages)
    with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, after, count)):
        mgpu.warpgroup_barrier()
        with _one_thread():
            copy(ctx, plan, refs, words.add(first, after), start, words.remainder(step, plan.stages))


def arrived(plan: Plan, refs: dict[str, Any], step: Any) -> Any:
    """Wait for the copies of a step, and return its slot."""
    slot = words.remainder(step, plan.stages)
    _wait(refs, slot, words.both(words.quotient(step, plan.stages), 1))
    return slot


def scales_arrived(plan: Plan, refs: dict[str, Any]) -> None:
    """Wait for the scales of the whole product."""
    _wait(refs, words.number(plan.stages), words.number(0))


def part(ref: Any, slot: Any) -> Any:
    """Return what a ring holds in a slot."""
    return mgpu.memref_slice(ref, (_index(slot),))


def copy(ctx: Any, plan: Plan, refs: dict[str, Any], at: Any, start: Any, slot: Any) -> None:
    """Begin the copies of step `at` to a slot; by one thread."""
    tile = plan.tile
    barrier = _barrier(refs, slot)
    scales = 0 if tile.whole else _bytes_of_scales(plan, refs)
    barrier.arrive_expect_tx(tile.outputs * tile.lines * LINE + tile.rows * tile.inputs * 2 + scales)
    line = words.times(at, tile.lines)
    for i in range(tile.lines):
        begin_of_line = words.times(words.add(line, i), LINE)
        inside = mgpu.memref_slice(refs["weight"], (_index(slot), i))
        where = _from(start, tile.outputs), _from(begin_of_line, LINE)
        _take(ctx, refs["values"], inside, where, barrier, swizzle=LINE)
    where = _from(words.number(0), tile.rows), _from(words.times(at, tile.inputs), tile.inputs)
    tiled = mgpu.TileTransform((tile.rows, LINE // 2))
    _take(ctx, refs["x"], part(refs["rows"], slot), where, barrier, swizzle=LINE, gmem_transform=(tiled,))
    if not tile.whole:
        group = words.quotient(words.times(at, tile.lines * BANKS), tile.group)
        _copy_scales(ctx, plan, refs, group, start, slot, barrier)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Have one thread of the block do what follows.

    Mosaic's own context keeps in a global variable that it is in one: when several threads of the host lower kernels at
    once, one of them then has all threads of its block do it.
    """
    branch = scf.IfOp(utils.single_thread_predicate(utils.ThreadSubset.BLOCK))
    with ir.InsertionPoint(branch.then_block):
        yield
        scf.YieldOp([])


def _copy_scales(ctx, plan, refs, group, start, slot, barrier) -> None:
    tile = plan.tile
    for name, ref in refs["scales"].items():
        columns = _from(words.number(0), tile.row_of_steps) if name == "step" else _from(start, tile.outputs)
        where = _from(group, tile.groups), columns
        _take(ctx, ref, part(refs["kept"][name], slot), where, barrier)


def _take(ctx, source, target, where, barrier, **how) -> None:
    # Past the end zeros come.
    ctx.async_copy(
        src_ref=source, dst_ref=target, gmem_slice=where, barrier=barrier, arrive=False, predicate=None, **how
    )


def _bytes_of_scales(plan: Plan, refs: dict[str, Any]) -> int:
    tile = plan.tile
    widths = {name: tile.row_of_steps if name == "step" else tile.outputs for name in refs["scales"]}
    return sum(tile.groups * n * words.width(refs["kept"][name]) for name, n in widths.items())


def _from(base: Any, length: int) -> Any:
    return mgpu.ds(_index(base), length)


def _index(word: Any) -> Any:
    return arith.index_castui(ir.IndexType.get(), word)


def _barrier(refs: dict[str, Any], slot: Any) -> mgpu.BarrierRef:
    return mgpu.BarrierRef(words.pointer(refs["full"]), slot, None, 1)


def _wait(refs: dict[str, Any], slot: Any, parity: Any) -> None:
    _barrier(refs, slot).wait_parity(arith.trunci(ir.IntegerType.get_signless(1), parity))
