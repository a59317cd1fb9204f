"""Packed groups in pages that rows share (KIVI, 2402.02750; PagedAttention, 2309.06180)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from jaxinfer.cache.groups import Groups, dequantize_groups
from jaxinfer.ops.attention import group_heads, visible
from jaxinfer.ops.attention_parts import Part, as_part
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.online_attention import SLOT_BLOCK, shares_of_blocks
from jaxinfer.ops.tpu_attention import DECODE_TOKENS
from pallas_kernels import paged_kivi_attention


@nnx.dataclass
class PackedPages(nnx.Module):
    """P pages of whole groups of G tokens, keys and values side by side: the layout of `paged_kivi_attention`.

    Slot s of row b is slot `s % page` of page `table[b, s // page]`.
    """

    codes: UInt8[Array, "P 2 K bytes H"] = nnx.data()
    key_grids: Float[Array, "P 2 K groups H"] = nnx.data()  # scales, offsets
    value_grids: Float[Array, "P 2 KR page"] = nnx.data()

    @property
    def page(self) -> int:
        """How many tokens are in a page."""
        return self.value_grids.shape[3]

    @property
    def size(self) -> int:
        """How many tokens are in a group, G."""
        return self.page // self.key_grids.shape[3]

    def write(self, new: Groups, table: Int[Array, "B M"], index: Int[Array, "B"]) -> "PackedPages":
        """Return the pages with one group a row in: group index[b] of row b; a row with a negative index has none."""
        each = self.page // self.size
        number = jnp.take_along_axis(table, jnp.maximum(index, 0)[:, None] // each, axis=1)
        number = jnp.where(index[:, None] >= 0, number, len(self.codes))  # past the end: dropped
        first = (jnp.maximum(index, 0) % each)[:, None]

        def put(pages, *new):
            x = jnp.stack(new, axis=1)  # [B, 2, K, own, H], or [B, 2, KR, own]
            at = first * x.shape[3] + jnp.arange(x.shape[3])
            return pages.at[number, :, :, at].set(jnp.moveaxis(x, 3, 1), mode="drop")

        return PackedPages(
            put(self.codes, new.k_codes, new.v_codes),
            put(self.key_grids, new.k_scale, new.k_offset),
            put(self.value_grids, new.v_scale, new.v_offset),
        )

    def gather(self, numbers: Int[Array, "B m"]) -> Groups:
        """Return the groups of some pages of each row, one page after the other."""

        def part(x, i):  # [B, m, K, own, ...] -> [B, K, m * own, ...]
            x = x[numbers, i].swapaxes(1, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        keys, values, k_scale, k_offset, v_scale, v_offset = (
            part(x, i) for x in (self.codes, self.key_grids, self.value_grids) for i in (0, 1)
        )
        return Groups(keys, k_scale, k_offset, values, v_scale, v_offset)


def paged_packed_attention(
    q: Float[Array, "B T N H"],
    pages: PackedPages,
    table: Int[Array, "B M"],
    length: Int[Array, "B"],
    position: Int[Array, "B"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    implementation: Implementation | None = None,
) -> Part:
    """Return attention of a few new tokens over each row's first length[b] packed ones, and its log-sum-exp.

    Query t of row b is at `position[b] + t`, past all of these. The newer tokens are another part, merged by the
    log-sum-exp (`attention_parts.as_share`). Entries of the table past a row's length name nothing.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)
    pallas, xla = (functools.partial(f, **options) for f in (_by_kernel, _by_blocks))
    return choose(implementation, pallas, xla, q, pages, table, length, position)


def _by_kernel(q, pages, table, length, position, **options: Any) -> Part:
    if q.shape[1] > DECODE_TOKENS:
        raise NotImplementedError(f"{q.shape[1]} queries a row over pages: must be at most {DECODE_TOKENS}")
    if pages.codes.shape[3] * 2 != pages.page:
        raise NotImplementedError("pages of other than 4-bit codes")
    out, lse = paged_kivi_attention.tpu(
        q, pages.codes, pages.key_grids, pages.value_grids, table, length, group=pages.size, position=position,
        return_lse=True, **options,
    )  # fmt: skip
    return out.astype(jnp.float32), lse


def _by_blocks(q, pages, table, length, position, *, scale, window, softcap) -> Part:
    """Gather and unpack some pages of every row at a time, as far as the longest row goes."""
    page, M = pages.page, table.shape[1]
    grouped = group_heads(q, pages.codes.shape[2], scale)
    table = jnp.where(jnp.arange(M) * page < length[:, None], table, 0)
    positions = position[:, None] + jnp.arange(q.shape[1])
    each = min(M, max(1, SLOT_BLOCK // page))

    def read(i: Array):
        start = jnp.minimum(i * each, M - each)
        found = pages.gather(jax.lax.dynamic_slice_in_dim(table, start, each, axis=1))
        slots = start * page + jnp.arange(each * page)[None]
        # The last block may reach back over slots that the one before it has counted.
        own = (slots >= i * each * page) & (slots < length[:, None])
        return *dequantize_groups(found, grouped.dtype), visible(positions, slots, window) & own[:, None]

    first, last = jnp.int32(0), -(-length.max() // (each * page))
    if window is not None:
        first = jnp.maximum(position.min() - window + 1, 0) // (each * page)
    return as_part(shares_of_blocks(grouped, read, first, last, softcap))
