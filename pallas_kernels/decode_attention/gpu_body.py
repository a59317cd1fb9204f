"""The body of decode attention on Hopper: one warpgroup takes a share of a row's live blocks, for one key head.

Slots are the rows of the matrix units, which take 64 at a time, and queries the columns, of which 8 are enough: few
queries waste nothing, and registers hold only what they need. The products are `K q^T`, `[slots, columns]`, and
`V^T p^T`, `[H, columns]`. The maximum over slots is taken across warps; the total is kept apart in every thread, to
be added up once at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_attention import gpu_instructions
from pallas_kernels.decode_attention.gpu_cluster import Parts
from pallas_kernels.decode_attention.gpu_codes import widen
from pallas_kernels.decode_attention.gpu_lanes import LEAST, LOG2E, NOTHING
from pallas_kernels.decode_attention.gpu_masks import BY_COLUMN, BY_SLOT, MATRIX, NUMBER, Mask, Range, wide
from pallas_kernels.decode_attention.gpu_plan import Plan
from pallas_kernels.decode_attention.gpu_stream import Stream


def body(plan: Plan, source: Any, refs: dict[str, Any], memory: dict[str, Any]) -> None:
    """Attend to a split's share of a row; `source` finds the blocks of keys and values, and starts to copy them."""
    if plan.overlap:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    group, tile = _divide(jax.lax.axis_index("rows"), plan.tiles)
    b, head = _divide(group, plan.kv_heads)
    split = jax.lax.axis_index("splits")
    at = Range(plan, refs, b)  # what no copy of the cache begins without is read first
    first_column = tile * plan.columns
    columns = pl.ds(first_column, plan.columns)
    # Past the last row and past H a copy fills in zeros; where it begins is not known when it is compiled, or jax
    # would not allow it.
    width = pl.ds(group * 0, plan.width)
    plgpu.copy_gmem_to_smem(refs["q"].at[group, columns, width], memory["q"], memory["q_barrier"])
    begin, end = at.share(split)

    stream = Stream(plan, source, refs, memory, at, b, head, begin, end)
    stream.fill()
    plgpu.barrier_wait(memory["q_barrier"])
    mask = Mask(plan, refs, at, b, first_column)

    def step(item: Any, carry: Any) -> Any:
        acc, peak, total = carry
        stage, base = stream.stage(item), at.base_of(item)
        whole = at.whole(base)
        later = item + plan.stages
        more, where = later < end, stream.place(later)  # looked up early: it is not waited for
        scores = _scores(plan, memory, stage)

        @pl.when(more)
        def _():
            stream.load(later, where, "k")

        scores = jax.lax.cond(whole, lambda x: x, lambda x: jnp.where(mask.seen(base), x, NOTHING), scores)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - wide(new_peak, scores.shape, 1))
        shrink = jnp.exp2(peak - new_peak)
        total = total * wide(shrink, total.shape, 1)
        for part in range(plan.slots // 64):
            total = total + weights[64 * part : 64 * (part + 1)]
        acc = _mixed(plan, memory, stage, whole, mask.alive(base), weights, acc * wide(shrink, acc.shape, 1))

        @pl.when(more)
        def _():
            stream.load(later, where, "v")

        return acc, new_peak, total

    zeros = _filled((plan.width, plan.columns), 0.0, MATRIX), _filled((64, plan.columns), 0.0, MATRIX)
    acc, peak, total = jax.lax.fori_loop(
        begin, end, step, (zeros[0], _filled((plan.columns,), LEAST, BY_COLUMN), zeros[1])
    )
    total = jnp.sum(total, axis=0)
    nothing = total == 0.0
    safe = jnp.where(nothing, 1.0, total)
    acc = acc * wide(1.0 / safe, acc.shape, 1)
    if plan.cluster is not None:
        _merged(plan, (acc, peak, total), memory["parts"], split, first_column, group, refs)
        return
    turned = plgpu.layout_cast(acc.astype(plan.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    compat.transposed(memory["out"])[...] = turned
    plgpu.commit_smem()
    if plan.exact:
        plgpu.copy_smem_to_gmem(memory["out"].at[pl.ds(0, plan.rows)], refs["out"].at[group, split])
    else:  # a copy to memory does not always stop at an axis' end: all rows of the tile are there
        plgpu.copy_smem_to_gmem(memory["out"], refs["out"].at[group, split, columns, width])
    if plan.with_lse:
        lse = jnp.where(nothing, -jnp.inf, peak * (1 / LOG2E) + jnp.log(safe))
        refs["lse"].at[group, split, columns][...] = lse
    plgpu.wait_smem_to_gmem(0)


def _merged(
    plan: Plan, own: tuple[Any, Any, Any], parts: Any, block: Any, first: Any, group: Any, refs: dict[str, Any]
) -> None:
    """Write the output that a cluster's blocks find: of each its `own`, the peak of its scores, and their total."""
    found = [refs[name].at[group] for name in ("out", "lse") if name in refs]
    types = MATRIX, BY_COLUMN, BY_COLUMN, plgpu.RefType(), NUMBER, NUMBER, [plgpu.RefType() for _ in found]

    @plgpu.inline_mgpu(arg_types=types, return_type=())
    def run(_: Any, acc: Any, peak: Any, total: Any, parts: Any, block: Any, first: Any, found: Any) -> Any:
        parts = Parts(plan.cluster, parts, block.registers.item())
        parts.put_matrix(*[gpu_instructions.floats(array) for array in (acc, peak, total)])
        out, lse = (*found, None)[:2]
        parts.merge(first.registers.item(), out, plan.letters, lse)
        return ()

    run(*own, parts, block, first, found)


def _scores(plan: Plan, memory: dict[str, Any], stage: Any) -> Any:
    """Return the scores of a block in base 2, `[slots, columns]`."""
    plgpu.barrier_wait(memory["k_barrier"].at[stage])
    keys = memory["k"].at[stage]
    if plan.quantized:
        keys = widen(keys, MATRIX)
    found = multiply(None, keys, compat.transposed(memory["q"]))
    factor = plan.scale * LOG2E if plan.softcap is None else plan.scale / plan.softcap
    if plan.quantized:
        steps = compat.load(memory["k_scale"].at[stage], BY_SLOT).astype(jnp.float32)
        found = found * wide(steps * factor, found.shape, 0)
    else:
        found = found * factor
    if plan.softcap is not None:
        # tanh(x) by the exponential: the hardware's own tanh has three digits.
        found = (plan.softcap * LOG2E) * (1.0 - 2.0 / (jnp.exp2(found * (2 * LOG2E)) + 1.0))
    return found


def _mixed(plan: Plan, memory: dict[str, Any], stage: Any, whole: Any, alive: Any, weights: Any, acc: Any) -> Any:
    """Return `acc`, `[H, columns]`, and to it the block's values under the weights; zero where nothing is alive."""
    plgpu.barrier_wait(memory["v_barrier"].at[stage])
    values = memory["v"].at[stage]
    if plan.quantized:
        steps = compat.load(memory["v_scale"].at[stage], BY_SLOT).astype(jnp.float32)
        steps = jax.lax.cond(whole, lambda x: x, lambda x: jnp.where(alive((plan.slots,), BY_SLOT), x, 0.0), steps)
        weights = weights * wide(steps, weights.shape, 0)
        memory["wide"][...] = widen(values)
        values = memory["wide"]
    else:

        @pl.when(jnp.logical_not(whole))
        def _():
            # What nothing wrote may be NaN, which a weight of 0 does not undo.
            held = compat.load(values, MATRIX, optimized=True)
            values[...] = jnp.where(alive(held.shape, MATRIX), held, jnp.zeros((), held.dtype))

    turned = plgpu.layout_cast(weights.astype(plan.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    compat.transposed(memory["weights"])[...] = turned
    plgpu.commit_smem()
    return multiply(acc, compat.transposed(values), compat.transposed(memory["weights"]))


def multiply(acc: Any, a: Any, b: Any) -> Any:
    """Return `acc + a b` in float32, without `acc` where it is None; a and b are refs, or a is held in registers."""
    if acc is None:

        def product(acc_ref: Any) -> Any:
            plgpu.wgmma(acc_ref, a, b)
            return acc_ref[...]

        return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def added(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(added)(plgpu.ACC.init(acc))


def _divide(index: Any, by: int) -> tuple[Any, Any]:
    return jax.lax.div(index, jnp.int32(by)), jax.lax.rem(index, jnp.int32(by))


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
