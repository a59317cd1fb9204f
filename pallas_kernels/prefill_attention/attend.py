"""Attention of blocks of queries over a cache of any store: the kernel's call, and the queries as it takes them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import calls, compat, stream
from pallas_kernels.calls import Interpret, Known, round_up
from pallas_kernels.prefill_attention.body import LANES, body
from pallas_kernels.prefill_attention.plan import Plan

ROWS = 16  # a tile of bfloat16


def attend_blocks(
    name: str,
    q: Float[Array, "B T N H"],
    store: Any,
    plan: Plan,
    scalars: list[Known],
    kv_heads: int,
    *,
    rows: int,
    scale: float,
    softcap: float | None,
    return_lse: bool,
    interpret: Interpret,
):
    """Return the output `[B, T, N, H]`, and its log-sum-exp `[B, T, N]` or None; `rows` are multiplied at a time."""
    B, T, N, H = q.shape
    n, heads, queries = plan.blocks, plan.heads, plan.queries
    G = N // heads
    R = G * queries
    grouped = jnp.pad(q, ((0, 0), (0, n * queries - T), (0, 0), (0, 0))).reshape(B, n, queries, heads, G, H)
    grouped = grouped.transpose(0, 3, 1, 4, 2, 5).reshape(B, heads, n * R, H)
    shapes = [jax.ShapeDtypeStruct(grouped.shape, q.dtype)]
    block = pl.BlockSpec((1, 1, R, H), lambda b, x, i: (b, x, i, 0))
    out_specs = [block]
    if return_lse:
        shapes.append(jax.ShapeDtypeStruct((B, heads, n, 1, R), jnp.float32))
        out_specs.append(pl.BlockSpec((1, 1, 1, 1, R), lambda b, x, i: (b, x, i, 0, 0)))
    scratch = [stream.state(), *[compat.VMEM((R, LANES), jnp.float32)] * 2, compat.VMEM((R, H), jnp.float32)]
    if plan.sequences is not None:
        scratch.append(compat.VMEM((queries, LANES), jnp.int32))
    found = calls.call(
        functools.partial(
            body, plan=plan, store=store, scalars=len(scalars), shared=heads // kv_heads, rows=rows,
            with_lse=return_lse, scale=scale, softcap=softcap,
        ),
        name=name,
        out_shape=shapes,
        grid=(B, heads, n),
        in_specs=[block] + [pl.BlockSpec(memory_space=compat.ANY)] * len(store.arrays),
        out_specs=out_specs,
        scratch=[*scratch, *store.scratch(q.dtype)],
        scalars=scalars,
        semantics=("arbitrary",) * 3,  # the copies run on from one block of queries into the next
        interpret=interpret,
    )(grouped, *store.arrays)  # fmt: skip

    def ungroup(x):
        x = x.reshape(B, heads, n, G, queries, -1).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(B, n * queries, N, -1)[:, :T]

    return ungroup(found[0]), ungroup(found[1])[..., 0] if return_lse else None


def fit_slots(slots: int, S: int) -> int:
    """Return the most slots, at most `slots` and not below a quarter of them, that divide S in whole lanes, or pad."""
    slots = round_up(min(slots, S), LANES)
    return next((n for n in range(slots, slots // 4, -LANES) if S % n == 0), slots)


def fit_rows(rows: int, queries: int, G: int) -> int:
    """Return how many rows are multiplied at a time: whole query heads, or a whole fraction of one."""
    if rows >= queries:
        return queries * next(n for n in range(min(rows // queries, G), 0, -1) if G % n == 0)
    return next((n for n in range(rows - rows % ROWS, 0, -ROWS) if queries % n == 0), queries)
