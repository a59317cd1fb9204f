"""The kernel of prefill attention: one block of queries of one key head a grid point, its blocks of slots in a loop."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.calls import div
from pallas_kernels.decode_attention.softmax import LEAST, LOG2E, NOTHING
from pallas_kernels.prefill_attention.plan import Plan, Ranges, seen
from pallas_kernels.stream import Stream

LANES = 128


def body(
    *refs,
    plan: Plan,
    store: Any,
    scalars: int,
    shared: int,
    rows: int,
    with_lse: bool,
    scale: float,
    softcap: float | None,
):
    """Attend: `rows` query rows at a time, `shared` heads of `plan.heads` to a key head."""
    ranges = Ranges(plan, refs[:scalars])
    refs = list(refs[scalars:])

    def next_refs(count):
        return [refs.pop(0) for _ in range(count)]

    (q_ref,) = next_refs(1)
    arrays = next_refs(len(store.arrays))
    (out_ref,) = next_refs(1)
    lse_ref = next_refs(1)[0] if with_lse else None
    state, peak_ref, total_ref, acc_ref = next_refs(4)
    low_ref = next_refs(1)[0] if plan.sequences is not None else None
    blocks = store.inside(arrays, refs)
    slots, queries = plan.slots, plan.queries
    R, H = q_ref.shape[2:]
    row = (pl.program_id(0) * plan.heads + pl.program_id(1)) * plan.blocks + pl.program_id(2)
    dtype = q_ref.dtype
    exact = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def copies(r, item, buffer):
        b, head, _ = ranges.at(r)
        return blocks.copies(b, div(head, shared), ranges.block(r, item), buffer)

    stream = Stream(state, store.depth, plan.B * plan.heads * plan.blocks, ranges.items, copies)

    @pl.when(row == 0)
    def _():
        stream.begin()

    b, _, i = ranges.at(row)
    length = ranges.length[b]
    position = ranges.position[b] + i * queries
    peak_ref[...] = jnp.full_like(peak_ref, LEAST)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    if low_ref is not None:
        _sequences(plan, ranges, b, i, low_ref)

    def product(chunk, keys):
        return jax.lax.dot_general(
            q_ref[0, 0, chunk], keys, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )

    def mask(first, base):
        """Return what the queries of a chunk that begins at row `first` see of a block."""
        count = min(rows, queries)
        token = first % queries
        at = position + token + jax.lax.broadcasted_iota(jnp.int32, (count, 1), 0)
        low = None if low_ref is None else low_ref[token : token + count, :1]
        slot = base + jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)
        found = seen(plan, at, low, slot, length)
        return found if rows == count else jnp.concatenate([found] * (rows // count))

    every = [slice(r, r + rows) for r in range(0, R, rows)]
    later = [chunk for chunk in every if chunk.start % queries >= queries // 2]
    halves = rows <= queries // 2 and queries // 2 % rows == 0

    def attend(buffer, base, masked, chunks):
        keys, values, k_scale, v_scale = blocks.read(buffer, dtype, masked, base, length)
        scores = product(chunks[0], keys)
        for n, chunk in enumerate(chunks):
            # The next product comes before this softmax: the MXU works while the VPU does.
            following = product(chunks[n + 1], keys) if n + 1 < len(chunks) else None
            if k_scale is not None:
                scores *= k_scale
            if softcap is None:
                scores *= scale * LOG2E
            else:
                scores = (softcap * LOG2E) * jnp.tanh(scores * (scale / softcap))
            if masked:
                # Anew for each: a comparison costs less than a mask kept in VMEM.
                scores = jnp.where(mask(chunk.start, base), scores, NOTHING)
            before = peak_ref[chunk]
            peak = jnp.maximum(before, scores.max(axis=1, keepdims=True))
            weights = jnp.exp2(scores - _wide(peak, slots))
            shrink = jnp.exp2(before - peak)
            # Totals stay apart by lane until the end: no sum over lanes in the loop.
            total_ref[chunk] = total_ref[chunk] * shrink + sum(
                weights[:, at : at + LANES] for at in range(0, slots, LANES)
            )
            peak_ref[chunk] = peak
            if v_scale is not None:
                weights *= v_scale
            mixed = jax.lax.dot_general(
                weights.astype(dtype), values, (((1,), (0,)), ((), ())), precision=exact,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            acc_ref[chunk] = acc_ref[chunk] * _wide(shrink, H) + mixed
            scores = following

    def step(item, _):
        buffer = stream.take(row, item)
        block = ranges.block(row, item)
        whole = ranges.whole(row, block)
        base = block * slots
        blocks.ready(buffer, base, length)
        # On the diagonal the first half of the queries may come before all slots of a block.
        half = jnp.logical_not(whole) & (base >= position + queries // 2) if halves else jnp.bool_(False)

        @pl.when(whole)
        def _():
            attend(buffer, base, False, every)

        @pl.when(jnp.logical_not(whole | half))
        def _():
            attend(buffer, base, True, every)

        if halves:

            @pl.when(half)
            def _():
                attend(buffer, base, True, later)

        return 0

    jax.lax.fori_loop(0, ranges.items(row), step, 0)
    total = total_ref[...].sum(axis=1, keepdims=True)
    safe = jnp.where(total == 0, 1.0, total)
    out_ref[0, 0] = (acc_ref[...] / safe).astype(dtype)
    if with_lse:
        lse = jnp.where(total == 0, -jnp.inf, peak_ref[...] / LOG2E + jnp.log(safe))
        lse_ref[0, 0, 0] = lse.T[:1]


def _wide(x, lanes):
    """Return `x`, all of whose lanes are equal, with as many lanes."""
    if lanes <= LANES:
        return x[:, :lanes]
    return jnp.concatenate([x] * -(-lanes // LANES), axis=1)[:, :lanes]


def _sequences(plan, ranges, b, i, low_ref):
    """Write where the sequence of each query of a block begins."""
    token = i * plan.queries + jax.lax.broadcasted_iota(jnp.int32, low_ref.shape, 0)
    low_ref[...] = jnp.full_like(low_ref, plan.S)

    def step(r, _):
        start = ranges.starts[b * plan.sequences + r]
        low_ref[...] = jnp.where(token >= start, start, low_ref[...])
        return 0

    index = b * plan.blocks + i
    jax.lax.fori_loop(ranges.before[index], ranges.after[index], step, 0)
