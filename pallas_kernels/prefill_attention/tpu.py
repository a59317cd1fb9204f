"""Prefill attention on TPU over a dense cache."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import calls, chips, tuning
from pallas_kernels.calls import Interpret, Known, round_up
from pallas_kernels.prefill_attention.attend import ROWS, attend_blocks, fit_rows, fit_slots
from pallas_kernels.prefill_attention.body import LANES
from pallas_kernels.prefill_attention.plan import SMEM_ENTRIES, Plan
from pallas_kernels.prefill_attention.stores import Dense


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
    B, T, N, _ = q.shape
    K, S = k.shape[1:3]
    check(q, k, position, starts, window, sinks, counts, lists, sparse_block, k_scale, v_scale)
    chosen = blocks or tuning.blocks(
        "prefill_attention", chips.current().name, shape_class(q, k, lists=lists, window=window)
    )
    heads = K if lists is None else lists.shape[1]
    G = N // heads
    if sparse_block is None:
        queries = min(chosen["queries"], round_up(T, ROWS))
        slots = fit_slots(chosen["slots"], S)
    else:
        queries, slots = sparse_block
    rows = fit_rows(chosen["rows"], queries, G)
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

    store = Dense(k, v, k_scale, v_scale, slots=slots, depth=chosen["buffers"])
    out, lse = attend_blocks(
        "prefill_attention", q, store, plan, scalars, K, rows=rows, scale=scale, softcap=softcap,
        return_lse=return_lse, interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


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


def check(q, k, position, starts, window, sinks, counts, lists, sparse_block, k_scale, v_scale):
    """Raise for arguments that do not belong together, as `prefill_attention` says."""
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
