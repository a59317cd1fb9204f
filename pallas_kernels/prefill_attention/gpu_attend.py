"""What a warpgroup that multiplies does, in the kernel of prefill attention on a Hopper GPU."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.calls import rem
from pallas_kernels.prefill_attention.gpu_plan import ROWS, TILE, stage_of

LEAST = -1e30  # the peak of what sees nothing: finite, so that no infinities are subtracted
LOG2E = math.log2(math.e)


def attend(arrays, held, plan, group, scale, softcap, items, b, head, i, first, last, done):
    """Attend for 64 queries, and write their output; `done` blocks of slots came before theirs."""
    groups, stages, slots = plan.queries // ROWS, held["keys"].shape[0], plan.slots
    H, dtype = held["queries"].shape[-1], held["queries"].dtype
    queries = held["queries"].at[group]
    following = 1 - group if groups == 2 else rem(group + 1, groups)
    token = i * plan.queries + group * ROWS
    sums = plgpu.Layout.WGMMA.reduce(1)
    seen_from = None
    if plan.ragged:
        seen_from = compat.load(arrays["low"].at[b, pl.ds(token, ROWS)], sums)
    seen_from, seen_to = items.seen(
        items.position + token + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=sums), seen_from
    )

    def weigh(scores, base, masked, peak, total):
        """Return the weights of a block's scores, the new peak and total, and what the sums before shrink by."""
        factor = scale * LOG2E
        if softcap is not None:
            scores = (softcap * LOG2E) * jnp.tanh(scores * (scale / softcap))
            factor = 1.0

        def hide(scores):
            lane = plgpu.broadcasted_iota(jnp.int32, (ROWS, slots), 1, layout=plgpu.Layout.WGMMA)
            first, end = (
                None if x is None else lax.broadcast_in_dim(x - base, (ROWS, slots), [0]) for x in (seen_from, seen_to)
            )
            found = lane < end
            if first is not None:
                found &= (lane >= first) | (lane < plan.sinks - base) if plan.sinks else lane >= first
            return jnp.where(found, scores, -jnp.inf)

        if masked is None:
            scores = lax.cond(items.is_whole(base), lambda x: x, hide, scores)
        elif masked:
            scores = hide(scores)
        top = jnp.maximum(peak, scores.max(axis=1) * factor)
        shrink = jnp.exp2(peak - top)
        weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(top, scores.shape, [0]))
        return weights, top, total * shrink + weights.sum(axis=1), shrink

    def clean_values(stage, base):
        """Zero the values that the row does not have: they may be NaN, and 0 * NaN is NaN."""
        if not plan.bounded:
            return

        @pl.when(base + slots > items.length)
        def _():
            # Every warpgroup does, for itself: all write the same, so none has to wait for another.
            for row in range(0, slots, ROWS):
                slot = plgpu.broadcasted_iota(jnp.int32, (ROWS, TILE), 0, layout=plgpu.Layout.WGMMA)
                live = slot < items.length - base - row
                for lane in range(0, H, TILE):
                    part = held["values"].at[stage, pl.ds(row, ROWS), pl.ds(lane, TILE)]
                    part[...] = jnp.where(live, part[...], jnp.zeros((), dtype))
            plgpu.commit_smem()

    def multiply_keys(scores, stage):
        plgpu.wgmma(scores, queries, compat.transposed(held["keys"].at[stage]))

    def multiply_first(scores):
        plgpu.barrier_wait(held["keys_ready"].at[stage_of(done, stages)])

        @pl.when((group > 0) | jnp.logical_not(first))
        def _():
            plgpu.barrier_wait(held["turn"].at[group])

        multiply_keys(scores, stage_of(done, stages))
        plgpu.barrier_arrive(held["turn"].at[following])
        return plgpu.wgmma_accumulator_load(scores)

    def step(item, carry, masked):
        stage, before = stage_of(done + item, stages), stage_of(done + item - 1, stages)
        base = items.block(item) * slots
        acc, peak, total, weights = carry

        def multiply(refs):
            acc, scores, *found = refs
            plgpu.barrier_wait(held["keys_ready"].at[stage])
            plgpu.barrier_wait(held["turn"].at[group])
            multiply_keys(scores, stage)
            plgpu.wgmma(acc, weights, held["values"].at[before])
            plgpu.barrier_arrive(held["turn"].at[following])
            # The second product is still under way.
            fresh = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            plgpu.barrier_arrive(held["keys_free"].at[stage])
            # The assembler moves nothing over a wait for a barrier: here it keeps masks out of the registers while the
            # first product is under way, below it keeps the exponentials before the wait for the second.
            if masked is not False:
                plgpu.barrier_wait(held["values_ready"].at[stage])
            for ref, value in zip(found, weigh(fresh, base, masked, peak, total), strict=True):
                ref[...] = value
            if masked is False:
                plgpu.barrier_wait(held["values_ready"].at[stage])

        state = (plgpu.ACC.init(acc), plgpu.ACC.init(no_scores), no_scores, peak, total, peak)
        acc, _, wide, peak, total, shrink = pl.run_state(multiply)(state)
        plgpu.barrier_arrive(held["values_free"].at[before])
        acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
        weights = wide.astype(dtype)
        if plan.lists is not None:
            clean_values(stage, base)
        return acc, peak, total, weights

    def multiply_last(weights, stage):
        def multiply(acc):
            plgpu.barrier_wait(held["turn"].at[group])
            plgpu.wgmma(acc, weights, held["values"].at[stage])

            @pl.when((group < groups - 1) | jnp.logical_not(last))
            def _():
                plgpu.barrier_arrive(held["turn"].at[following])

        return multiply

    peak = plgpu.layout_cast(jnp.full((ROWS,), LEAST, jnp.float32), sums)
    total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), sums)
    acc = plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA)
    no_scores = plgpu.layout_cast(jnp.zeros((ROWS, slots), jnp.float32), plgpu.Layout.WGMMA)
    masked = None if plan.lists is not None else True

    plgpu.barrier_wait(held["queries_ready"].at[group])
    scores = lax.optimization_barrier(pl.run_scoped(multiply_first, plgpu.ACC((ROWS, slots), jnp.float32)))
    stage = stage_of(done, stages)
    plgpu.barrier_arrive(held["keys_free"].at[stage])
    base = items.block(jnp.int32(0)) * slots
    wide, peak, total, _ = weigh(scores, base, masked, peak, total)
    plgpu.barrier_wait(held["values_ready"].at[stage])
    clean_values(stage, base)  # no other block may reach beyond the row's end, unless blocks are in lists
    carry = acc, peak, total, wide.astype(dtype)

    def loop(start, end, carry, masked):
        return lax.fori_loop(start, end, lambda item, carry: step(item, carry, masked), carry)

    if plan.lists is not None:
        carry = loop(1, items.total, carry, None)
    else:
        whole, end = (jnp.maximum(x, 1) for x in items.whole)
        carry = loop(1, whole, carry, True)
        carry = loop(whole, end, carry, False)
        if plan.window is not None or plan.ragged:
            carry = loop(end, items.total, carry, True)
    acc, peak, total, weights = carry
    out = queries
    if "out" in held:
        plgpu.barrier_arrive(held["queries_free"].at[group])
        out = held["out"].at[group]
    stage = stage_of(done + items.total - 1, stages)
    acc = pl.run_state(multiply_last(weights, stage))(plgpu.ACC.init(acc))
    plgpu.barrier_arrive(held["values_free"].at[stage])

    rows = pl.ds(token, ROWS)
    share = jnp.where(total > 0, 1 / total, 0.0)
    plgpu.wait_smem_to_gmem(0)  # the output before, which is long written
    out[...] = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(dtype)
    if "sums" in held:
        held["sums"].at[group][...] = jnp.where(total > 0, peak / LOG2E + jnp.log(total), -jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out, arrays["out"].at[b, rows, head])
    if "sums" in held:
        plgpu.copy_smem_to_gmem(held["sums"].at[group], arrays["lse"].at[b, head, rows])
    if "out" not in held:
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(held["queries_free"].at[group])
    return done + items.total
