"""Packed groups in pages that rows share (KIVI, 2402.02750; PagedAttention, 2309.06180)."""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from jaxinfer.cache.groups import Groups, empty_groups
from jaxinfer.cache.page_table import copy_pages, fork_pages, join_table, own_table
from jaxinfer.ops.placement import Names
from jaxinfer.ops.scatter import put, put_box


@nnx.dataclass
class PackedPages(nnx.Module):
    """P pages of whole groups of G tokens, keys and values side by side, and the table that `page_table` is about.

    The layout is that of `pallas_kernels.paged_kivi_attention`; what a page holds is what `Groups` holds of a row.
    """

    codes: UInt8[Array, "P 2 K bytes H"] = nnx.data()
    key_grids: Float[Array, "P 2 K groups H"] = nnx.data()  # scales, offsets
    value_grids: Float[Array, "P 2 KR page"] = nnx.data()
    table: Int[Array, "B M"] = nnx.data()
    axes: ClassVar[dict[str, Names]] = {
        "codes": ("batch", None, "kv_heads"), "key_grids": ("batch", None, "kv_heads"),
        "value_grids": ("batch", None, "kv_heads"), "table": ("batch",),
    }  # fmt: skip

    @property
    def kv_heads(self) -> int:
        """How many heads there are, K."""
        return self.codes.shape[2]

    @property
    def page(self) -> int:
        """How many tokens are in a page."""
        return self.value_grids.shape[3]

    @property
    def size(self) -> int:
        """How many tokens are in a group, G."""
        return self.page // self.together

    @property
    def together(self) -> int:
        """How many groups lie together: those of a page."""
        return self.key_grids.shape[3]

    @property
    def slots(self) -> int:
        """How many tokens a row may have."""
        return self.table.shape[1] * self.page

    @property
    def count(self) -> int:
        """How many groups a row may have."""
        return self.table.shape[1] * self.together

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return 8 * self.codes.shape[3] // self.page

    def cut(self, start: Int[Array, ""], count: int) -> Groups:
        """Return groups start .. start + count - 1 of each row: whole pages."""
        each = self.together
        numbers = jax.lax.dynamic_slice_in_dim(self.table, start // each, count // each, axis=1)

        def part(x, i):  # [B, m, K, own, ...] -> [B, K, m * own, ...]
            x = x[numbers, i].swapaxes(1, 2)
            return x.reshape(*x.shape[:2], -1, *x.shape[4:])

        return self._groups(part)

    def of_rows(self, index: Int[Array, "B"]) -> Groups:
        """Return one group of each row: group index[b] of row b."""
        number = jnp.take_along_axis(self.table, index[:, None] // self.together, axis=1)[..., None]

        def part(x, i):
            own = x.shape[3] // self.together
            slots = index[:, None] % self.together * own + jnp.arange(own)
            return x[number, i, jnp.arange(x.shape[2])[:, None], slots[:, None]]  # by heads: see `put_box`

        return self._groups(part)

    def rows(self) -> Groups:
        """Return every row's groups, in rows of its own."""
        return self.cut(jnp.int32(0), self.count)

    def write(self, new: Groups, first: Int[Array, "B"], counts: Int[Array, "B"]) -> "PackedPages":
        """Return the pages with each row's first counts[b] new groups at its places from first[b]."""
        C, each = new.count, self.together
        index = first[:, None] + jnp.arange(C)
        kept = (jnp.arange(C) < counts[:, None]) & (index < self.count)
        number = jnp.take_along_axis(self.table, jnp.minimum(index, self.count - 1) // each, axis=1)
        number = jnp.where(kept, number, len(self.codes))[..., None]  # past the end: dropped

        def part(pages, x):  # [B, 2, K, C * own, ...]
            own = pages.shape[3] // each
            x = x.reshape(*x.shape[:3], C, own, *x.shape[4:])
            slots = (index % each)[..., None] * own + jnp.arange(own)
            return put(pages, (number, slice(None), slice(None), slots), jnp.moveaxis(x, (3, 4), (1, 2)))

        return self._put(part, new)

    def write_one(self, new: Groups, row: Int[Array, ""], index: Int[Array, ""]) -> "PackedPages":
        """Return the pages with the one group of one row in `new` at group `index` of row `row`, in place."""
        number, at = self.table[row, index // self.together], index % self.together

        def part(pages, x):
            return put_box(pages, (number, 0, 0, at * (pages.shape[3] // self.together)), x)

        return self._put(part, new)

    def take(self, rows: Int[Array, "n"]) -> "PackedPages":
        """Return copies of rows, each in pages of its own."""
        pool = copy_pages((self.codes, self.key_grids, self.value_grids), self.table[rows])
        return PackedPages(*pool, own_table(len(pool[0]), len(rows)))

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "PackedPages":
        """Return rows that share the pages that are full at their first length[i] tokens: see `fork_pages`."""
        pool = (self.codes, self.key_grids, self.value_grids)
        pool, table = fork_pages(pool, self.table[rows], self.page, length, room)
        return PackedPages(*pool, table)

    def joined(self, pools: int) -> "PackedPages":
        """Return the rows of so many pools, end to end, each with as many rows, as rows of one pool."""
        table = join_table(self.table, len(self.codes), pools)
        return PackedPages(self.codes, self.key_grids, self.value_grids, table)

    def _groups(self, part) -> Groups:
        """Return `part(array, i)` of the keys' and the values' arrays, i = 0 and 1 in each."""
        keys, values, k_scale, k_offset, v_scale, v_offset = (
            part(x, i) for x in (self.codes, self.key_grids, self.value_grids) for i in (0, 1)
        )
        return Groups(keys, k_scale, k_offset, values, v_scale, v_offset)

    def _put(self, part, new: Groups) -> "PackedPages":
        """Return the pages that `part(pages, new)` of each array gives."""
        pairs = (
            (self.codes, (new.k_codes, new.v_codes)),
            (self.key_grids, (new.k_scale, new.k_offset)),
            (self.value_grids, (new.v_scale, new.v_offset)),
        )
        return PackedPages(*(part(pages, jnp.stack(x, axis=1)) for pages, x in pairs), self.table)


def empty_pages(
    page: int, batch: int, kv_heads: int, count: int, group: int, head_dim: int, bits: int, dtype: DTypeLike
) -> PackedPages:
    """Return pages with room for `count` groups in each of `batch` rows, and page 0."""
    each = page // group
    pages = 1 + batch * -(-count // each)
    new = empty_groups(pages, kv_heads, each, group, head_dim, bits, dtype)
    pool = (jnp.stack([x, x], axis=1) for x in (new.k_codes, new.k_scale, new.v_scale))
    return PackedPages(*pool, own_table(pages, batch))
