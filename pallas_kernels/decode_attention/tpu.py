"""Decode attention on TPU: blocks of all key heads stream through VMEM, row after row, into an online softmax.

The grid is (splits, rows of heads); splits of the cache run on the cores of a chip that has two, and their shares are
merged by their log-sum-exp. Scores are kept in base 2: exp2 is what the hardware has.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import calls, chips, compat, tuning
from pallas_kernels.calls import div, rem
from pallas_kernels.codes import widen
from pallas_kernels.stream import Stream, state

LOG2E = math.log2(math.e)
NOTHING = -1e30  # the score of a slot that is not seen
LEAST = -1e20  # where the peak begins: what is not seen has a weight of exactly 0, also before anything is seen


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    length: Int[Array, "B"],
    *,
    scale: float,
    start: Int[Array, "B"] | None = None,
    position: Int[Array, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Array, "... T T"] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: calls.Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: slots a copy, key heads a copy, buffers, splits; by default those tuned for the chip.

    Raises:
        NotImplementedError: more slots than a block holds, of which no block of whole tiles is a divisor.
        ValueError: blocks that need too much VMEM.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    if tree is not None and position is not None:
        raise ValueError("position and tree: a tree's own slots give the positions of its queries")
    chosen = blocks or tuning.blocks("decode_attention", chips.current().name, shape_class(q, k))
    heads = math.gcd(chosen["heads"], K)
    slots = fit_block(chosen["slots"], S, 128 if k_scale is not None else 16 if k.dtype.itemsize == 2 else 32)
    depth, splits = chosen["buffers"], chosen["splits"]
    if window is not None and sinks > slots:
        raise NotImplementedError(f"sinks={sinks}: more than the {slots} slots of a block")
    G = N // K
    rows = calls.round_up(G * T, 8)
    queries = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - G * T), (0, 0)))
    scalars = calls.scalar_math(functools.partial(_scalars, B=B, T=T, S=S), length, start, position)
    quantized, with_lse = k_scale is not None, return_lse or splits > 1
    chunks = K // heads

    def at(_, r):
        return div(r, chunks), rem(r, chunks), 0, 0

    inputs, specs = [queries], [pl.BlockSpec((1, heads, rows, H), at)]
    if tree is not None:
        inputs.append(_tree_rows(jnp.asarray(tree), B, G, rows))
        specs.append(pl.BlockSpec((1, rows, 128), lambda _, r: (div(r, chunks), 0, 0)))
    inputs += [k, v, *((k_scale, v_scale) if quantized else ())]
    specs += [pl.BlockSpec(memory_space=compat.ANY)] * (4 if quantized else 2)
    partial_dtype = jnp.float32 if splits > 1 else q.dtype
    shapes = [jax.ShapeDtypeStruct((splits, B, K, rows, H), partial_dtype)]
    out_specs = [pl.BlockSpec((1, 1, heads, rows, H), lambda s, r: (s, *at(s, r)))]
    if with_lse:
        shapes.append(jax.ShapeDtypeStruct((splits, B, K, rows, 128), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, heads, rows, 128), lambda s, r: (s, *at(s, r))))
    buffers = [compat.VMEM((depth, heads, slots, H), k.dtype)] * 2
    if quantized:
        buffers += [compat.VMEM((depth, heads, slots), k_scale.dtype)] * 2
    scratch = [
        *buffers,
        compat.dma_semaphores(depth, len(buffers)),
        state(),
        compat.VMEM((heads * rows, 128), jnp.float32),
        compat.VMEM((heads * rows, 128), jnp.float32),
        compat.VMEM((heads * rows, H), jnp.float32),
    ]
    body = functools.partial(
        _body, T=T, slots=slots, heads=heads, depth=depth, splits=splits, chunks=chunks, rows_total=B * chunks,
        scale=scale, window=window, sinks=sinks, softcap=softcap, quantized=quantized, tree=tree is not None,
        with_lse=with_lse,
    )  # fmt: skip
    run = calls.call(
        body,
        name="decode_attention",
        out_shape=shapes,
        grid=(splits, B * chunks),
        in_specs=specs,
        out_specs=out_specs,
        scratch=scratch,
        scalars=scalars,
        semantics=("parallel", "arbitrary"),
        interpret=interpret,
    )
    out, *lse = run(*inputs)
    out, lse = _merge(out, lse[0][..., 0] if lse else None)

    def ungroup(x):
        return x[:, :, : G * T].reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

    out = ungroup(out).astype(q.dtype)
    return (out, ungroup(lse[..., None])[..., 0]) if return_lse else out


def shape_class(q: Array, k: Array, *_, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: the cache's dtype and shape."""
    return {"dtype": jnp.dtype(k.dtype).name, "K": k.shape[1], "S": k.shape[2], "H": k.shape[3]}


def fit_block(slots: int, S: int, tile: int) -> int:
    """Return the most slots, at most `slots`, in whole tiles that divide S; all S where one block holds them.

    Raises:
        NotImplementedError: there is no such number.
    """
    if slots >= S:
        return S
    for size in range(slots - slots % tile, 0, -tile):
        if S % size == 0:
            return size
    raise NotImplementedError(f"{S} cache slots: must be a multiple of {tile}, or at most {slots}")


def _scalars(length, start, position, *, B, T, S):
    """Return for each row the first live slot, the position of query 0, and the end of the live slots."""
    length = jnp.asarray(length, jnp.int32)
    start = jnp.zeros(B, jnp.int32) if start is None else jnp.asarray(start, jnp.int32)
    position = length - T if position is None else jnp.asarray(position, jnp.int32)
    return start, position, jnp.minimum(length, S)


def _tree_rows(tree: Bool[Array, "..."], B: int, G: int, rows: int) -> Float[Array, "B R 128"]:
    """Return for each query row which nodes it sees, in lanes, and its depth in the last lane."""
    T = tree.shape[-1]
    tree = jnp.broadcast_to(tree, (B, T, T)).astype(jnp.float32)
    wide = jnp.concatenate([tree, jnp.zeros((B, T, 127 - T)), tree.sum(-1, keepdims=True) - 1], axis=-1)
    return jnp.pad(jnp.tile(wide, (1, G, 1)), ((0, 0), (0, rows - G * T), (0, 0)))


def _merge(out: Float[Array, "X B K R H"], lse: Float[Array, "X B K R"] | None):
    """Return the attention over all splits, and the log of its total."""
    if lse is None or out.shape[0] == 1:
        return out[0], None if lse is None else lse[0]
    peak = lse.max(axis=0)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - jnp.where(peak == -jnp.inf, 0, peak)))
    total = weight.sum(axis=0)
    mixed = (out * weight[..., None]).sum(axis=0) / jnp.where(total == 0, 1, total)[..., None]
    return mixed, jnp.where(total == 0, -jnp.inf, peak + jnp.log(jnp.where(total == 0, 1, total)))


def _body(
    start_ref, position_ref, length_ref, q_ref, *refs, T, slots, heads, depth, splits, chunks, rows_total, scale,
    window, sinks, softcap, quantized, tree, with_lse,
):  # fmt: skip
    refs = list(refs)
    tree_ref = refs.pop(0) if tree else None
    stores = [refs.pop(0) for _ in range(4 if quantized else 2)]
    out_ref = refs.pop(0)
    lse_ref = refs.pop(0) if with_lse else None
    buffers = [refs.pop(0) for _ in stores]
    semaphores, state_ref, peak_ref, total_ref, acc_ref = refs
    split, row = pl.program_id(0), pl.program_id(1)

    def range_of(r):
        """Return the first block of a row, its blocks, and whether block 0 comes before them for the sinks."""
        b = div(r, chunks)
        low = start_ref[b]
        if window is not None:
            low = jnp.maximum(low, (length_ref[b] - T if tree else position_ref[b]) + 1 - window)
        end = length_ref[b] if tree else jnp.minimum(length_ref[b], position_ref[b] + T)
        first = div(jnp.maximum(low, 0), slots)
        count = jnp.maximum(div(end + slots - 1, slots) - first, 0)
        apart = jnp.int32(0)
        if window is not None and sinks:
            apart = ((first > 0) & (count > 0) & (start_ref[b] < sinks)).astype(jnp.int32)
        return first, count, apart

    def items_before(r):
        """Return the index of this split's first item of a row, and how many it has."""
        _, count, apart = range_of(r)
        each = div(count + apart + splits - 1, splits)
        begin = jnp.minimum(split * each, count + apart)
        return begin, jnp.minimum(each, count + apart - begin)

    def block_of(r, item):
        first, _, apart = range_of(r)
        index = items_before(r)[0] + item
        return jnp.where((apart == 1) & (index == 0), 0, first + index - apart)

    def copies(r, item, buffer):
        b, head = div(r, chunks), rem(r, chunks) * heads
        base = pl.multiple_of(block_of(r, item) * slots, slots)
        head = pl.multiple_of(head, heads)
        return [
            pltpu.make_async_copy(
                store.at[(b, pl.ds(head, heads), pl.ds(base, slots))], buf.at[buffer], semaphores.at[buffer, i]
            )
            for i, (store, buf) in enumerate(zip(stores, buffers, strict=True))
        ]

    stream = Stream(state_ref, depth, rows_total, lambda r: items_before(r)[1], copies)

    @pl.when(row == 0)
    def _():
        stream.begin()

    peak_ref[...] = jnp.full_like(peak_ref, LEAST)
    total_ref[...] = jnp.zeros_like(total_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    b = div(row, chunks)
    start, position, length = start_ref[b], position_ref[b], length_ref[b]
    R = q_ref.shape[2]

    def attend(buffer, base, masked):
        # Every stage for all heads at once: one head's chain of latencies would leave the units idle.
        each = range(heads)
        keys = [widen(buffers[0][buffer, h], q_ref.dtype) for h in each]
        scores = [_dot(q_ref[0, h], keys[h], ((1,), (1,))) for h in each]
        if quantized:
            scores = [scores[h] * buffers[2][buffer, h : h + 1].astype(jnp.float32) for h in each]
        scores = jnp.concatenate(scores)
        if softcap is None:
            scores *= scale * LOG2E
        else:
            scores = (softcap * LOG2E) * jnp.tanh(scores * (scale / softcap))
        if masked:
            slot = base + jax.lax.broadcasted_iota(jnp.int32, (R, slots), 1)
            seen = _seen(slot, tree_ref, start, position, length, T, window, sinks)
            seen = jnp.concatenate([seen] * heads)
            scores = jnp.where(seen, scores, NOTHING)
        before = peak_ref[:, :1]
        peak = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - peak)
        shrink = jnp.exp2(before - peak)
        total_ref[...] = total_ref[...] * shrink + weights.sum(axis=1, keepdims=True)
        peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)
        values = [widen(buffers[1][buffer, h], q_ref.dtype) for h in each]
        if masked:
            line = base + jax.lax.broadcasted_iota(jnp.int32, (slots, 1), 0)
            alive = (line >= start) & (line < length)
            # In float32: a select of packed halves is what libtpu's simulator on v5e cannot follow.
            values = [jnp.where(alive, x.astype(jnp.float32), 0).astype(x.dtype) for x in values]
        weights = [weights[h * R : (h + 1) * R] for h in each]
        if quantized:
            factors = [buffers[3][buffer, h : h + 1].astype(jnp.float32) for h in each]
            if masked:
                alive = _alive(base, slots, start, length)
                factors = [jnp.where(alive, x, 0) for x in factors]
            weights = [weights[h] * factors[h] for h in each]
        found = [_dot(weights[h].astype(q_ref.dtype), values[h], ((1,), (0,))) for h in each]
        acc_ref[...] = acc_ref[...] * shrink + jnp.concatenate(found)

    def step(item, _):
        buffer = stream.take(row, item)
        base = block_of(row, item) * slots
        lowest = start if window is None else jnp.maximum(start, position + T - window)
        whole = (base >= lowest) & (base + slots <= (length - T + 1 if tree else jnp.minimum(length, position + 1)))
        if tree and window is not None:
            whole = jnp.bool_(False)

        @pl.when(whole)
        def _():
            attend(buffer, base, masked=False)

        @pl.when(jnp.logical_not(whole))
        def _():
            attend(buffer, base, masked=True)

        return 0

    jax.lax.fori_loop(0, items_before(row)[1], step, 0)
    total = total_ref[:, :1]
    safe = jnp.where(total == 0, 1.0, total)
    out_ref[0, 0] = (acc_ref[...] / safe).reshape(heads, R, -1).astype(out_ref.dtype)
    if with_lse:
        lse = jnp.where(total == 0, -jnp.inf, peak_ref[:, :1] / LOG2E + jnp.log(safe))
        lse_ref[0, 0] = jnp.broadcast_to(lse, peak_ref.shape).reshape(heads, R, 128)


def _seen(slot, tree_ref, start, position, length, T, window, sinks):
    """Return which slots of a block each query row sees."""
    query = rem(jax.lax.broadcasted_iota(jnp.int32, slot.shape, 0), T)
    seen = slot >= start
    if tree_ref is None:
        at = position + query
        seen &= (slot < length) & (slot <= at)
    else:
        trees = tree_ref[0]
        at = length - T + trees[:, 127:128].astype(jnp.int32)
        inside = slot < length - T
        for node in range(T):
            inside |= (slot == length - T + node) & (trees[:, node : node + 1] > 0)
        seen &= inside
    if window is not None:
        seen &= (slot > at - window) | (slot < sinks)
    return seen


def _alive(base, slots, start, length):
    slot = base + jax.lax.broadcasted_iota(jnp.int32, (1, slots), 1)
    return (slot >= start) & (slot < length)


def _dot(a, b, contract):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)
