"""Prefill attention on TPU over a dense cache."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import calls, chips, compat, stream, tuning
from pallas_kernels.calls import Interpret, Known, round_up
from pallas_kernels.prefill_attention.body import LANES, body
from pallas_kernels.prefill_attention.plan import SMEM_ENTRIES, Plan

ROWS = 16  # a tile of bfloat16


def prefill_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    scale: float,
    position: Int[Known, "B"] | None = None,
    length: Int[Known, "B"] | None = None,
    starts: Int[Known, "B _"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    counts: Int[Known, "B X _"] | None = None,
    lists: Int[Known, "B X _ most"] | None = None,
    sparse_block: tuple[int, int] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: queries and slots a block, rows of a product at a time, buffers; by default those tuned for the chip.
    A cache whose slots no block of whole lanes divides is padded first, which copies it.

    Raises:
        NotImplementedError: ragged rows with sinks or at positions; sparse blocks that are no whole tiles, or more of
            them than SMEM holds.
        ValueError: what does not belong together; blocks that need too much VMEM.
    """
    B, T, N, H = q.shape
    K, S = k.shape[1:3]
    _check(q, k, position, starts, window, sinks, counts, lists, sparse_block, k_scale, v_scale)
    chosen = blocks or tuning.blocks(
        "prefill_attention", chips.current().name, shape_class(q, k, lists=lists, window=window)
    )
    heads = K if lists is None else lists.shape[1]
    G = N // heads
    if sparse_block is None:
        queries = min(chosen["queries"], round_up(T, ROWS))
        slots = _divisor(chosen["slots"], S)
    else:
        queries, slots = sparse_block
    rows = _rows(chosen["rows"], queries, G)
    plan = Plan(
        B, T, S, heads, queries, slots, window, sinks, None if starts is None else starts.shape[1],
        None if lists is None else lists.shape[3],
    )  # fmt: skip
    zeros = np.zeros(B, np.int32)
    if starts is not None:
        ends = calls.scalar_math(lambda s: jnp.asarray(s, jnp.int32)[:, -1], starts)
        both = (ends,) if length is None else (ends, length)
        length = calls.scalar_math(lambda *x: functools.reduce(jnp.minimum, map(jnp.asarray, x)), *both)
    scalars = plan.scalars(
        zeros if position is None else position, zeros + S if length is None else length, starts, counts, lists
    )

    n, R = plan.blocks, G * queries
    grouped = jnp.pad(q, ((0, 0), (0, n * queries - T), (0, 0), (0, 0))).reshape(B, n, queries, heads, G, H)
    grouped = grouped.transpose(0, 3, 1, 4, 2, 5).reshape(B, heads, n * R, H)
    padding = round_up(S, slots) - S
    arrays = [jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) if padding else x for x in (k, v)]
    if k_scale is not None:
        # One row a key head: a copy of some slots is then whole lanes; float32, of which a row is whole words.
        arrays += [
            jnp.pad(x.astype(jnp.float32).reshape(B, K, 1, S), ((0, 0),) * 3 + ((0, padding),))
            for x in (k_scale, v_scale)
        ]

    shapes = [jax.ShapeDtypeStruct(grouped.shape, q.dtype)]
    block = pl.BlockSpec((1, 1, R, H), lambda b, x, i: (b, x, i, 0))
    out_specs = [block]
    if return_lse:
        shapes.append(jax.ShapeDtypeStruct((B, heads, n, 1, R), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, 1, R), lambda b, x, i: (b, x, i, 0, 0)))
    depth = chosen["buffers"]
    scratch = [stream.state(), *[compat.VMEM((R, LANES), jnp.float32)] * 2, compat.VMEM((R, H), jnp.float32)]
    if starts is not None:
        scratch.append(compat.VMEM((queries, LANES), jnp.int32))
    scratch += [compat.VMEM((depth, slots, H), x.dtype) for x in arrays[:2]]
    scratch += [compat.VMEM((depth, 1, slots), x.dtype) for x in arrays[2:]]
    scratch.append(compat.dma_semaphores(depth, len(arrays)))
    found = calls.call(
        functools.partial(
            body, plan=plan, scalars=len(scalars), shared=heads // K, rows=rows, depth=depth,
            quantized=k_scale is not None, with_lse=return_lse, scale=scale, softcap=softcap,
        ),
        name="prefill_attention",
        out_shape=shapes,
        grid=(B, heads, n),
        in_specs=[block] + [pl.BlockSpec(memory_space=compat.ANY)] * len(arrays),
        out_specs=out_specs,
        scratch=scratch,
        scalars=scalars,
        semantics=("arbitrary",) * 3,  # the copies run on from one block of queries into the next
        interpret=interpret,
    )(grouped, *arrays)  # fmt: skip

    def ungroup(x):
        x = x.reshape(B, heads, n, G, queries, -1).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(B, n * queries, N, -1)[:, :T]

    return (ungroup(found[0]), ungroup(found[1])[..., 0]) if return_lse else ungroup(found[0])


def shape_class(q: Any, k: Any, *_, lists: Any = None, window: int | None = None, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: the cache's bits, the query heads of a key head, tokens, slots and window."""
    return {
        "form": "dense" if lists is None else "sparse",
        "bits": 8 * jnp.dtype(k.dtype).itemsize,
        "G": q.shape[2] // k.shape[1],
        "T": q.shape[1],
        "S": k.shape[2],
        "H": k.shape[3],
        "window": min(window or k.shape[2], k.shape[2]),
    }


def _check(q, k, position, starts, window, sinks, counts, lists, sparse_block, k_scale, v_scale):
    if starts is not None and (position is not None or k.shape[2] != q.shape[1]):
        raise ValueError(f"starts: token t is in slot t, so S={k.shape[2]} must be T={q.shape[1]}, with no position")
    if starts is not None and window is not None and sinks:
        raise NotImplementedError(f"sinks={sinks} in ragged rows: the sinks are those of a whole row")
    if sinks and window is None:
        raise ValueError(f"sinks={sinks}: they are what is seen beyond a window, and there is none")
    if len({x is None for x in (counts, lists, sparse_block)}) > 1:
        raise ValueError("counts, lists and sparse_block: all or none")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale: both or none")
    if lists is None:
        return
    bq, bk = sparse_block
    if bq % ROWS or bk % LANES:
        raise NotImplementedError(f"sparse_block={sparse_block}: must be multiples of {ROWS} queries and {LANES} slots")
    if lists.shape[1] not in (k.shape[1], q.shape[2]) or lists.shape[2] != -(-q.shape[1] // bq):
        raise ValueError(f"lists {lists.shape}: must be [B, K or N, ceil(T / {bq}), most]")
    if lists.size > SMEM_ENTRIES:
        raise NotImplementedError(f"{lists.size} entries of block lists: SMEM holds {SMEM_ENTRIES} of them")


def _divisor(slots: int, S: int) -> int:
    """Return the most slots, at most `slots` and not below a quarter of them, that divide S in whole lanes, or pad."""
    slots = round_up(min(slots, S), LANES)
    return next((n for n in range(slots, slots // 4, -LANES) if S % n == 0), slots)


def _rows(rows: int, queries: int, G: int) -> int:
    """Return how many rows are multiplied at a time: whole query heads, or a whole fraction of one."""
    if rows >= queries:
        return queries * next(n for n in range(min(rows // queries, G), 0, -1) if G % n == 0)
    return next((n for n in range(rows - rows % ROWS, 0, -ROWS) if queries % n == 0), queries)
