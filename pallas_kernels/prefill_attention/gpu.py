"""Prefill attention on a Hopper GPU over a dense cache."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import compat, gpus
from pallas_kernels.calls import Interpret, Known, round_up, scalar_math
from pallas_kernels.prefill_attention.gpu_body import REGISTERS, body, scratch
from pallas_kernels.prefill_attention.gpu_plan import ROWS, Plan, together
from pallas_kernels.prefill_attention.reach import Packed
from pallas_kernels.prefill_attention.tpu import check

HEADS = (64, 128, 256)  # head dims
TILE = 8  # rows of a tile in shared memory
BESIDES = 2048  # bytes of shared memory for barriers and sums


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

    `blocks`: queries and slots a block, stages of the ring that the slots are copied into, and processors that share
    the blocks of queries, or 0: one for each. By default `default_blocks`.
    Codes are made numbers of q's dtype first, and heads padded to 64, 128 or 256 and queries and slots to whole tiles
    of 8: XLA copies what it changes, which takes little of a prompt's time.

    Raises:
        NotImplementedError: numbers that are not all of 16 bits; heads of over 256; ragged rows with sinks or at
            positions, or with block lists; sparse blocks that are no whole blocks of the kernel.
        ValueError: what does not belong together; blocks that need too much shared memory.
    """
    check(q, k, position, starts, window, sinks, counts, lists, sparse_block, k_scale, v_scale)
    return attend_slots(
        "prefill_attention", q, k, v, scale=scale, position=position, length=length, starts=starts, window=window,
        sinks=sinks, softcap=softcap, counts=counts, lists=lists, sparse_block=sparse_block, k_scale=k_scale,
        v_scale=v_scale, return_lse=return_lse, blocks=blocks, interpret=interpret,
    )  # fmt: skip


def attend_slots(
    name: str,
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    *,
    scale: float,
    position: Int[Known, "B"] | None,
    length: Int[Known, "B"] | None,
    starts: Int[Known, "B _"] | None = None,
    window: int | None,
    sinks: int = 0,
    softcap: float | None,
    counts: Int[Known, "B X _"] | None = None,
    lists: Int[Known, "B X _ most"] | None = None,
    sparse_block: tuple[int, int] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool,
    blocks: dict[str, int] | None,
    interpret: Interpret,
    packed: Packed | None = None,
):
    """Return the attention of a call that is checked, or (output, log-sum-exp); `packed`: of packed groups' tokens.

    Raises:
        NotImplementedError, ValueError: as `prefill_attention` does.
    """
    head = q.shape[3]
    q, k, v = _prepared(q, k, v, k_scale, v_scale)
    (B, T, N, H), (K, S) = q.shape, k.shape[1:3]
    chosen = blocks or default_blocks(q)
    queries, slots, stages = chosen["queries"], chosen["slots"], chosen["stages"]
    if lists is not None and (sparse_block[0] % queries or sparse_block[1] % slots):
        raise NotImplementedError(f"sparse_block={sparse_block}: must be multiples of {queries} queries, {slots} slots")
    plan = Plan(
        B, T, S, N, K, queries, slots, window, sinks, starts is not None,
        None if lists is None else (lists.shape[1], lists.shape[3]), sparse_block,
        any(x is not None for x in (length, starts, lists)), together(B * K, 4 * H, S), packed,
    )  # fmt: skip
    plan = dataclasses.replace(plan, processors=min(chosen.get("processors") or plan.all_tiles, plan.all_tiles))

    arrays = {"q": _padded(q, 1), "k": _padded(k, 2), "v": _padded(v, 2)}
    scalars = {"position": position, "length": length}
    if starts is not None:
        scalars |= dict(zip(("length", "low", "low_min", "low_max"), _lows(plan, starts, length), strict=True))
    if lists is not None:
        scalars |= {"counts": counts.reshape(-1), "lists": lists.reshape(-1)}
    arrays |= {name: jnp.asarray(x, jnp.int32) for name, x in scalars.items() if x is not None}
    results = {"out": jax.ShapeDtypeStruct(arrays["q"].shape, q.dtype)}
    if return_lse:
        results["lse"] = jax.ShapeDtypeStruct((B, N, plan.blocks * queries), jnp.float32)

    need = 2 * H * (queries + 2 * stages * slots) + BESIDES
    spare = gpus.current().shared - need
    if spare < 0 or stages < 2 or queries // ROWS not in REGISTERS or queries % ROWS or slots % ROWS:
        raise ValueError(
            f"blocks={chosen}: {need} bytes of shared memory must be {gpus.current().shared} or less, stages 2 or "
            f"more, queries {' or '.join(str(n * ROWS) for n in REGISTERS)}, and slots a multiple of {ROWS}"
        )
    apart = plan.processors < plan.all_tiles and spare >= 2 * H * queries
    memory = scratch(plan, H, q.dtype, stages, return_lse, apart)
    found = compat.gpu_kernel(
        functools.partial(body, names=[*arrays, *results], plan=plan, scale=scale, softcap=softcap, memory=memory),
        name=name,
        out_type=tuple(results.values()),
        grid=(plan.processors,),
        grid_names=("processor",),
        num_threads=queries // ROWS + 1,
        thread_name="group",
        interpret=interpret,
    )(*arrays.values())
    out = found[0][:, :T, :, :head]
    return (out, found[1][:, :, :T].swapaxes(1, 2)) if return_lse else out


def default_blocks(q: Any) -> dict[str, int]:
    """Return the blocks for queries: the most slots whose scores the registers hold, and whose copies the memory."""
    H = q.shape[3]
    slots, stages = {64: (128, 4), 128: (128, 2), 256: (64, 2)}[H]
    # Wide heads leave no memory for an output apart from the queries: a processor's next block would have to wait.
    return {"queries": 128, "slots": slots, "stages": stages, "processors": gpus.current().processors if H < 256 else 0}


def _padded(x: Array, axis: int) -> Array:
    """Return `x` with whole tiles along an axis."""
    short = round_up(x.shape[axis], TILE) - x.shape[axis]
    return jnp.pad(x, [(0, short if n == axis else 0) for n in range(x.ndim)]) if short else x


def _lows(plan: Plan, starts: Known, length: Known | None) -> tuple[Array, ...]:
    """Return the lengths, the slot that each query sees from, and of each block of queries the least and the most."""

    def math(starts, length):
        starts = jnp.asarray(starts, jnp.int32)
        token = jnp.minimum(jnp.arange(plan.blocks * plan.queries, dtype=jnp.int32), plan.T - 1)
        before = (starts[:, None] <= token[None, :, None]).sum(-1)  # the boundaries up to a token
        low = jnp.take_along_axis(starts, jnp.maximum(before - 1, 0), axis=1)
        low = jnp.where(before == 0, plan.S, low)  # it sees nothing
        ends = starts[:, -1] if length is None else jnp.minimum(starts[:, -1], jnp.asarray(length))
        of_block = low.reshape(plan.B, plan.blocks, plan.queries)
        return ends, low, of_block.min(-1).reshape(-1), of_block.max(-1).reshape(-1)

    return scalar_math(math, starts, length)


def _prepared(q: Array, k: Array, v: Array, k_scale: Array | None, v_scale: Array | None) -> tuple[Array, ...]:
    """Return q, k and v as numbers of 16 bits, with heads that the kernel knows.

    Raises:
        NotImplementedError: they can't be.
    """
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"q of {q.dtype}: must be bfloat16 or float16")
    if k_scale is not None:
        scaled = ((x.astype(jnp.float32) * s.astype(jnp.float32)[..., None]) for x, s in ((k, k_scale), (v, v_scale)))
        k, v = (x.astype(q.dtype) for x in scaled)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise NotImplementedError(f"{q.dtype}, {k.dtype} and {v.dtype}: q, k and v must be bfloat16, or all float16")
    H = q.shape[3]
    if max(HEADS) < H:
        raise NotImplementedError(f"H={H}: must be at most {max(HEADS)}")
    short = next(n for n in HEADS if n >= H) - H
    return tuple(jnp.pad(x, ((0, 0),) * 3 + ((0, short),)) if short else x for x in (q, k, v))
