"""Attention of many tokens over packed groups on TPU: a block's groups are unpacked once, in VMEM, for all its queries.

With hundreds of query rows that is cheaper than to multiply the queries by each group's scales, as a decode step does.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import chips, compat, tuning
from pallas_kernels.calls import Interpret, Known, round_up
from pallas_kernels.kivi_attention.products import unpacked
from pallas_kernels.prefill_attention.attend import ROWS, attend_blocks, fit_rows
from pallas_kernels.prefill_attention.body import LANES
from pallas_kernels.prefill_attention.plan import Plan


def kivi_prefill_attention(
    q: Float[Array, "B T N H"],
    k_codes: UInt8[Array, "B K S2 H"],
    v_codes: UInt8[Array, "B K S2 H"],
    k_scale: Float[Array, "B K M H"],
    k_offset: Float[Array, "B K M H"],
    v_scale: Float[Array, "B KR S"],
    v_offset: Float[Array, "B KR S"],
    length: Int[Known, "B"],
    *,
    scale: float,
    group: int,
    residual: int,
    position: Int[Known, "B"],
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: queries and slots a block, rows of a product at a time, buffers; by default those tuned for the chip.
    Groups that no block divides are padded first, which copies them. So are the scales, which are few.

    Raises:
        NotImplementedError: groups that do not fill whole tiles of bytes.
        ValueError: blocks that need too much VMEM.
    """
    B, T, N, _ = q.shape
    K, S = k_codes.shape[1], v_scale.shape[2]
    if group % 64:
        raise NotImplementedError(f"group={group}: must be a multiple of 64 tokens, whose bytes fill whole tiles")
    chosen = blocks or tuning.blocks(
        "kivi_prefill_attention", chips.current().name, shape_class(q, k_codes, group=group, window=window)
    )
    queries, slots = min(chosen["queries"], round_up(T, ROWS)), _fit_slots(chosen["slots"], S, group)
    plan = Plan(B, T, S, K, queries, slots, window, 0, None, None, packed=(group, residual))
    store = PackedBlocks(
        [k_codes, v_codes], [k_scale, k_offset], [v_scale, v_offset], group, slots=slots, depth=chosen["buffers"]
    )
    out, lse = attend_blocks(
        "kivi_prefill_attention", q, store, plan, plan.scalars(position, length, None, None, None), K,
        rows=fit_rows(chosen["rows"], queries, N // K), scale=scale, softcap=softcap, return_lse=return_lse,
        interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def shape_class(q: Any, k_codes: Any, *_, group: int, window: int | None = None, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: the query heads of a key head, tokens, slots, group and window."""
    _, K, half, H = k_codes.shape
    S = 2 * half
    return {"G": q.shape[2] // K, "T": q.shape[1], "S": S, "H": H, "group": group, "window": min(window or S, S)}


def _fit_slots(slots: int, S: int, group: int) -> int:
    """Return the most slots, at most `slots` and not below a quarter of them, that divide S in groups, or pad."""
    unit = math.lcm(group, LANES)
    slots = max(unit, min(slots, round_up(S, unit)) // unit * unit)
    return next((n for n in range(slots, slots // 4, -unit) if S % n == 0), slots)


class PackedBlocks:
    """Packed groups as a store of `attend_blocks`: a block is `slots` of one head."""

    def __init__(
        self,
        codes: Sequence[UInt8[Array, "B K S2 H"]],
        key_grids: Sequence[Float[Array, "B K M H"]],
        value_grids: Sequence[Float[Array, "B KR S"]],
        group: int,
        *,
        slots: int,
        depth: int,
    ):
        B, K, _, self.head_dim = codes[0].shape
        S = value_grids[0].shape[2]
        self.slots, self.group, self.depth = slots, group, depth
        self.groups, self.runs = slots // group, value_grids[0].shape[1] // K
        padding = round_up(S, slots) - S

        def padded(x, axis, size):
            return jnp.pad(x, [(0, size if i == axis else 0) for i in range(x.ndim)]) if size else x

        # A block's scales and offsets side by side, float32: a copy of them is whole words, wherever it begins.
        keys = [padded(x.astype(jnp.float32), 2, padding // group) for x in key_grids]
        keys = [x.reshape(B, K, -1, self.groups, self.head_dim) for x in keys]
        values = [padded(x.astype(jnp.float32).reshape(B, K, self.runs, S), 3, padding) for x in value_grids]
        self.arrays = [padded(x, 2, padding // 2) for x in codes]
        self.arrays += [jnp.concatenate(keys, axis=3), jnp.concatenate(values, axis=2)]

    def scratch(self, dtype: Any) -> list[Any]:
        """Return the buffers that blocks are copied into, and those of a block unpacked."""
        shapes = [(self.slots // 2, self.head_dim)] * 2
        shapes += [(2 * self.groups, self.head_dim), (2 * self.runs, self.slots)]
        buffers = [compat.VMEM((self.depth, *s), x.dtype) for s, x in zip(shapes, self.arrays, strict=True)]
        buffers += [compat.VMEM((self.slots, self.head_dim), dtype)] * 2
        return [*buffers, compat.dma_semaphores(self.depth, len(self.arrays))]

    def inside(self, arrays: Sequence[Any], scratch: Sequence[Any]):
        """Return the view inside the kernel."""
        return _PackedBlocksInside(self, arrays, scratch)


class _PackedBlocksInside:
    def __init__(self, store: PackedBlocks, arrays: Sequence[Any], scratch: Sequence[Any]):
        self.store, self.arrays = store, arrays
        *self.buffers, self.keys, self.values, self.semaphores = scratch

    def copies(self, row, head, block, buffer) -> list[Any]:
        """Return the copies of a block of a key head into a buffer."""
        half, slots = (pl.ds(pl.multiple_of(block * n, n), n) for n in (self.store.slots // 2, self.store.slots))
        places = [(row, head, half)] * 2 + [(row, head, block), (row, head, slice(None), slots)]
        return [
            pltpu.make_async_copy(array.at[place], to.at[buffer], self.semaphores.at[buffer, i])
            for i, (array, to, place) in enumerate(zip(self.arrays, self.buffers, places, strict=True))
        ]

    def ready(self, buffer, base, length) -> None:
        """Unpack a block that has come; values beyond the row's length become 0, whatever their scales are."""
        store, G = self.store, self.store.group
        grid = self.buffers[2][buffer]
        slot = base + jax.lax.broadcasted_iota(jnp.int32, (1, store.slots), 1)
        columns = jnp.where(slot < length, self.buffers[3][buffer], 0).T
        channel, width = jax.lax.broadcasted_iota(jnp.int32, (1, store.head_dim), 1), store.head_dim // store.runs

        def spread(at, first):
            """Return a number of each token, one a run, in all channels of the run."""
            found = columns[at, first : first + 1]
            for r in range(1, store.runs):
                found = jnp.where(channel >= r * width, columns[at, first + r : first + r + 1], found)
            return found

        codes = (unpacked(x[buffer], G, jnp.float32) for x in self.buffers[:2])
        for m, (keys, values) in enumerate(zip(*codes, strict=True)):
            at, offset = slice(m * G, (m + 1) * G), store.groups + m
            self.keys[at] = (keys * grid[m : m + 1] + grid[offset : offset + 1]).astype(self.keys.dtype)
            self.values[at] = (values * spread(at, 0) + spread(at, store.runs)).astype(self.values.dtype)

    def read(self, buffer, dtype, masked, base, length):
        """Return a block's keys and values `[slots, H]`; their scales are in them."""
        del buffer, dtype, masked, base, length
        return self.keys[...], self.values[...], None, None
