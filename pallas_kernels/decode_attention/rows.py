"""Attention of a few tokens a row over a cache of any store: its blocks stream through VMEM, row after row.

The grid is (splits, rows of heads); splits of the cache run on the cores of a chip that has two, and their shares are
merged by their log-sum-exp.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import calls
from pallas_kernels.calls import Interpret, Known, div, rem
from pallas_kernels.decode_attention import stores
from pallas_kernels.decode_attention.softmax import Softmax
from pallas_kernels.stream import Stream, state


def attend_rows(
    name: str,
    q: Float[Array, "B T N H"],
    store: Any,
    kv_heads: int,
    capacity: int,
    length: Int[Known, "B"],
    *,
    scale: float,
    start: Int[Known, "B"] | None,
    position: Int[Known, "B"] | None,
    window: int | None,
    sinks: int,
    softcap: float | None,
    tree: Bool[Known, "... T T"] | None,
    return_lse: bool,
    splits: int,
    interpret: Interpret,
):
    """Return the output, its log-sum-exp or None, and the arrays of the store that were changed in place.

    `capacity` is the number of slots that a row has at most.
    """
    B, T, N, H = q.shape
    K, heads = kv_heads, store.heads
    if tree is not None and position is not None:
        raise ValueError("position and tree: a tree's own slots give the positions of its queries")
    if window is not None and sinks > store.slots:
        raise NotImplementedError(f"sinks={sinks}: more than the {store.slots} slots of a block")
    G = N // K
    rows = calls.round_up(G * T, 8)
    queries = q.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    queries = jnp.pad(queries, ((0, 0), (0, 0), (0, rows - G * T), (0, 0)))
    scalars = calls.scalar_math(functools.partial(_scalars, B=B, T=T, S=capacity), length, start, position)
    with_lse = return_lse or splits > 1
    chunks = K // heads

    def at(_, r):
        return div(r, chunks), rem(r, chunks), 0, 0

    inputs, specs = [queries], [pl.BlockSpec((1, heads, rows, H), at)]
    if tree is not None:
        inputs.append(_tree_rows(jnp.asarray(tree), B, G, rows))
        specs.append(pl.BlockSpec((1, rows, 128), lambda _, r: (div(r, chunks), 0, 0)))
    before = len(inputs)
    shapes = [jax.ShapeDtypeStruct((splits, B, K, rows, H), jnp.float32 if splits > 1 else q.dtype)]
    out_specs = [pl.BlockSpec((1, 1, heads, rows, H), lambda s, r: (s, *at(s, r)))]
    if with_lse:
        shapes.append(jax.ShapeDtypeStruct((splits, B, K, rows, 128), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, heads, rows, 128), lambda s, r: (s, *at(s, r))))
    changed = store.arrays[: store.updated]
    aliases = {before + i: len(shapes) + i for i in range(len(changed))}
    body = functools.partial(
        _body, store=store, T=T, splits=splits, chunks=chunks, rows_total=B * chunks, tree=tree is not None,
        with_lse=with_lse, scale=scale, window=window, sinks=sinks, softcap=softcap,
    )  # fmt: skip
    found = calls.call(
        body,
        name=name,
        out_shape=shapes + [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in changed],
        grid=(splits, B * chunks),
        in_specs=specs + store.specs,
        out_specs=out_specs + store.specs[: len(changed)],
        scratch=[state(), *Softmax.scratch(heads * rows, H), *store.scratch(rows, q.dtype)],
        scalars=[*scalars, *store.scalars],
        semantics=("parallel", "arbitrary"),
        aliases=aliases,
        interpret=interpret,
    )(*inputs, *store.arrays)
    out, lse = _merge(found[0], found[1][..., 0] if with_lse else None)

    def ungroup(x):
        return x[:, :, : G * T].reshape(B, K, G, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

    out = ungroup(out).astype(q.dtype)
    return out, ungroup(lse[..., None])[..., 0] if return_lse else None, found[1 + with_lse :]


def _scalars(length, start, position, *, B, T, S):
    """Return for each row the first live slot, the position of query 0, and the end of the live slots."""
    length = jnp.asarray(length, jnp.int32)
    start = jnp.zeros(B, jnp.int32) if start is None else jnp.asarray(start, jnp.int32)
    position = length - T if position is None else jnp.asarray(position, jnp.int32)
    return start, position, jnp.minimum(length, S)


def _tree_rows(tree: Bool[Known, "..."], B: int, G: int, rows: int) -> Float[Array, "B R 128"]:
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
    start_ref, position_ref, length_ref, *refs, store, T, splits, chunks, rows_total, tree, with_lse, scale, window,
    sinks, softcap,
):  # fmt: skip
    refs = list(refs)

    def next_refs(count):
        return [refs.pop(0) for _ in range(count)]

    scalars = next_refs(len(store.scalars))
    (q_ref,) = next_refs(1)
    tree_ref = next_refs(1)[0] if tree else None
    arrays = next_refs(len(store.arrays))
    (out_ref,) = next_refs(1)
    lse_ref = next_refs(1)[0] if with_lse else None
    updated = next_refs(store.updated)
    (state_ref,) = next_refs(1)
    softmax = Softmax(*next_refs(3), scale=scale, softcap=softcap)
    blocks = store.inside(scalars, arrays, updated, refs)
    slots, heads = store.slots, store.heads
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

    def items_of(r):
        """Return the index of this split's first item of a row, and how many it has."""
        _, count, apart = range_of(r)
        each = div(count + apart + splits - 1, splits)
        begin = jnp.minimum(split * each, count + apart)
        return begin, jnp.minimum(each, count + apart - begin)

    def block_of(r, item):
        first, _, apart = range_of(r)
        index = items_of(r)[0] + item
        return jnp.where((apart == 1) & (index == 0), 0, first + index - apart)

    def copies(r, item, buffer):
        b = div(r, chunks)
        return blocks.copies(b, rem(r, chunks) * heads, block_of(r, item), buffer, length_ref[b])

    stream = Stream(state_ref, store.depth, rows_total, lambda r: items_of(r)[1], copies)

    @pl.when(row == 0)
    def _():
        stream.begin()

    b, head = div(row, chunks), rem(row, chunks) * heads
    start, position, length = start_ref[b], position_ref[b], length_ref[b]
    queries = [q_ref[0, h] for h in range(heads)]
    R = queries[0].shape[0]
    softmax.begin()
    blocks.begin(queries)

    def attend(buffer, base, masked):
        # Every stage for all heads at once: one head's chain of latencies would leave the units idle.
        scores = blocks.scores([q_ref[0, h] for h in range(heads)], buffer)
        seen = live = None
        if masked:
            slot = base + jax.lax.broadcasted_iota(jnp.int32, (R, slots), 1)
            seen = jnp.concatenate([_seen(slot, tree_ref, start, position, length, T, window, sinks)] * heads)
            live = stores.alive(base, slots, start, length)
        softmax.add(scores, lambda weights: blocks.mixed(weights, buffer, q_ref.dtype, live), seen)

    def step(item, _):
        buffer = stream.take(row, item)
        base = block_of(row, item) * slots
        lowest = start if window is None else jnp.maximum(start, position + T - window)
        whole = (base >= lowest) & (base + slots <= (length - T if tree else jnp.minimum(length, position + 1)))
        if tree and window is not None:
            whole = jnp.bool_(False)
        blocks.write(b, head, base, buffer, length)

        @pl.when(whole)
        def _():
            attend(buffer, base, masked=False)

        @pl.when(jnp.logical_not(whole))
        def _():
            attend(buffer, base, masked=True)

        blocks.wrote(b, head, base, buffer, length)
        return 0

    jax.lax.fori_loop(0, items_of(row)[1], step, 0)
    out, lse = softmax.result()
    out_ref[0, 0] = out.reshape(heads, R, -1).astype(out_ref.dtype)
    if with_lse:
        lse_ref[0, 0] = jnp.broadcast_to(lse, (heads * R, 128)).reshape(heads, R, 128)


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
