"""Old tokens in 4 bits or fewer, the newest ones as they are (KIVI, 2402.02750).

For a query at position p the tokens before `group * max(0, floor((p + 1 - residual) / group))` are quantized ones. That
depends on p alone: a prompt fed at once gives what the same prompt fed token by token gives.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.groups import Groups, empty_groups, packed_before, quantize_groups
from jaxinfer.cache.packed_attention import packed_attention
from jaxinfer.cache.packed_pages import PackedPages, empty_pages
from jaxinfer.cache.slots import pick, ring_positions, write
from jaxinfer.errors import InputError
from jaxinfer.ops.attention import QUERY_BLOCK, attention, by_query_blocks, group_heads, share, ungroup_heads, visible
from jaxinfer.ops.attention_parts import as_share
from jaxinfer.ops.online_attention import merge
from jaxinfer.ops.token_tree import TokenTree

SLACK = 32  # tokens that a row can be rewound by, at least
TILE = 16  # groups whose scales fill a tile of a TPU's memory: the kernel reads whole ones


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi:
    """The kind of cache that packs tokens in groups of `group` once `residual` newer ones have come after them.

    With a `page`, packed groups are in pages of as many tokens, which rows forked from one share.
    """

    bits: int = 4
    group: int = 32
    residual: int = 64
    page: int | None = None

    def __post_init__(self):
        if self.bits not in (2, 4):
            raise InputError(f"bits={self.bits}: must be 2 or 4; for 8 there is QuantizedCache")
        if self.group < 1 or self.residual < 0:
            raise InputError(f"group={self.group}, residual={self.residual}: must be at least 1 and 0 tokens")
        if self.group * self.bits % 8:
            raise InputError(f"group={self.group} of {self.bits} bits: must be a multiple of {8 // self.bits} tokens")
        if self.page is not None and (self.page < 1 or self.page % self.group):
            raise InputError(f"page={self.page}: must be a multiple of group={self.group} tokens")

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "KiviLayer":
        """Return an empty cache; the newest tokens are kept in `dtype`."""
        count = max(0, slots - self.residual) // self.group  # groups that some query reads
        if self.page is None and count > TILE and self.group % 64 == 0:
            count = TILE * -(-count // TILE)
        recent = self.group * -(-(self.residual + self.group + SLACK) // self.group) if count else slots
        empty = empty_groups if self.page is None else functools.partial(empty_pages, self.page)
        return KiviLayer(
            groups=empty(batch, kv_heads, count, self.group, head_dim, self.bits, dtype) if count else None,
            k=jnp.zeros((batch, kv_heads, recent, head_dim), dtype),
            v=jnp.zeros((batch, kv_heads, recent, head_dim), dtype),
            chunk=None,
            kind=self,
            slots=slots,
        )

    def boundary(self, positions: Int[Array, "*B"]) -> Int[Array, "*B"]:
        """Return how many tokens are quantized ones for a query at each position."""
        return packed_before(positions, self.group, self.residual)


@nnx.dataclass
class Chunk(nnx.Module):
    """The tokens that were appended last, where they are too many for the recent ones: their own queries need them."""

    k: Float[Array, "B K T H"] = nnx.data()
    v: Float[Array, "B K T H"] = nnx.data()
    start: Int[Array, "B"] = nnx.data()
    counts: Int[Array, "B"] = nnx.data()


@nnx.dataclass
class KiviLayer(nnx.Module):
    """Packed groups of old tokens and a ring of R recent ones: position s is in slot s mod R."""

    groups: Groups | PackedPages | None = nnx.data()  # None where the slots are too few for any
    k: Float[Array, "B K R H"] = nnx.data()
    v: Float[Array, "B K R H"] = nnx.data()
    chunk: Chunk | None = nnx.data()  # between append and attend
    kind: Kivi = nnx.static(kw_only=True)
    slots: int = nnx.static(kw_only=True)

    @property
    def exact_rewind(self) -> int | None:
        """As many tokens as the ring holds beyond those that a query reads in full precision."""
        R = self.k.shape[2]
        return None if self.slots <= R else R - self.kind.residual - self.kind.group

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "KiviLayer":
        """Keep each row's first counts[b] new tokens as they are, and pack the groups that they complete."""
        base, T = self._settled(), k.shape[1]
        counts = jnp.clip(self.slots - start, 0, counts)
        chunk = Chunk(
            k=k.astype(self.k.dtype).transpose(0, 2, 1, 3),
            v=v.astype(self.v.dtype).transpose(0, 2, 1, 3),
            start=start,
            counts=counts,
        )
        if base.groups is None:
            return base._replace(k=write(base.k, chunk.k, start, counts), v=write(base.v, chunk.v, start, counts))
        base = base._replace(groups=base._packed(chunk))
        base = base._replace(chunk=chunk)
        # A few tokens leave in the ring all that their queries read; what many would push out is still needed.
        return base._settled() if T <= SLACK else base

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "KiviLayer"]:
        """Attend over the packed groups, and over the recent tokens."""
        options = dict(scale=scale, window=window, softcap=softcap)
        if self.groups is None:
            return attention(q, self.k, self.v, positions, tree=tree, **options), self
        if tree is not None:
            self._check_tree(q.shape[1])
        end = positions[:, 0] + (positions >= 0).sum(axis=1) if self.chunk is None else self.chunk.start
        held = ring_positions(end, self.k.shape[2])
        options |= dict(residual=self.kind.residual, consecutive=tree is None)  # none of a tree's nodes is packed yet
        old = packed_attention(q, self.groups, positions, **options)

        def attend(q: Array, positions: Array, first: Array, *old: Array) -> Array:
            grouped, boundary = group_heads(q, self.k.shape[1], scale), self.kind.boundary(positions)

            def as_they_are(k, v, slots):
                seen = visible(positions, slots, window, tree) & (slots[:, None] >= boundary[..., None])
                return share(grouped, k, v, seen, softcap)

            found = as_they_are(self.k, self.v, held)
            if self.chunk is not None:
                found = merge(found, as_they_are(*self._near(first)))
            return ungroup_heads(merge(found, as_share(*old, self.k.shape[1])), q)

        return by_query_blocks(attend, q, positions, *old), self._settled()

    def rewind(self, length: Int[Array, "B"]) -> "KiviLayer":
        """Nothing to do but to let go of the chunk: what lies past the length is masked, and written again."""
        return self._settled()

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "KiviLayer":
        """Append the path anew, in place of the tree: groups that it completes are packed, and not what a tree left."""
        base = self._settled()
        at = ((start[:, None] + nodes) % self.k.shape[2])[:, None, :, None]
        k, v = (jnp.take_along_axis(ring, at, axis=2).transpose(0, 2, 1, 3) for ring in (base.k, base.v))
        return base.append(k, v, start, counts)._settled()

    def take(self, rows: Int[Array, "n"]) -> "KiviLayer":
        """Copy the rows."""
        base = self._settled()
        groups = None if base.groups is None else base.groups.take(rows)
        return base._replace(groups=groups, k=base.k[rows], v=base.v[rows])

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "KiviLayer":
        """Copy the recent tokens; of the packed ones pages are shared that are full, and rows copied."""
        base = self._settled()
        groups = None if base.groups is None else base.groups.fork(rows, length, room)
        return base._replace(groups=groups, k=base.k[rows], v=base.v[rows])

    def _check_tree(self, nodes: int) -> None:
        """Raise InputError where a tree's own nodes would be packed before they are read, or leave the ring."""
        most = min(self.kind.residual, SLACK)
        if nodes > most:
            raise InputError(
                f"a tree of {nodes} nodes: this cache of residual={self.kind.residual} takes at most {most}; "
                "draft fewer, or keep more tokens as they are"
            )

    def _near(self, first: Array) -> tuple[Array, Array, Array]:
        """Return the chunk's tokens that a block of queries may read as they are, with their positions."""
        T, reach = self.chunk.k.shape[2], self.kind.residual + self.kind.group
        size = min(T, QUERY_BLOCK + reach)
        begin = jnp.clip(first - reach, 0, T - size)
        offset = begin + jnp.arange(size)[None]
        slots = jnp.where(offset < self.chunk.counts[:, None], self.chunk.start[:, None] + offset, -1)
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=begin, slice_size=size, axis=2)
        return cut(self.chunk.k), cut(self.chunk.v), slots

    def _packed(self, chunk: Chunk) -> Groups | PackedPages:
        """Return the groups with those packed that the chunk completes."""
        G, T = self.kind.group, chunk.k.shape[2]
        first = chunk.start // G
        complete = jnp.where(chunk.counts > 0, (chunk.start + chunk.counts) // G - first, 0)
        if T > G:
            return self.groups.write(self._quantized(chunk, -(-T // G)), first, complete)
        # One group of a row at most. Only rows that complete theirs do anything, one by one and in place: a step has
        # few of them, and to write all rows at once would copy the groups.
        complete = (complete > 0) & (first < self.groups.count)
        rows = jnp.argsort(~complete)

        def pack(i: Array, groups: Groups | PackedPages) -> Groups | PackedPages:
            cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=rows[i], slice_size=1)
            own, new = jax.tree.map(cut, (self._replace(groups=None), chunk))
            return groups.write_one(own._quantized(new, 1), rows[i], first[rows[i]])

        return jax.lax.fori_loop(0, complete.sum(), pack, self.groups)

    def _quantized(self, chunk: Chunk, count: int) -> Groups:
        """Return `count` groups of each row from the one that the chunk begins in."""
        B, K, R, H = self.k.shape
        positions = (chunk.start // self.kind.group * self.kind.group)[:, None] + jnp.arange(count * self.kind.group)

        def tokens(ring, new):
            old = jnp.take_along_axis(ring, (positions % R)[:, None, :, None], axis=2)
            return pick(old, new, positions - chunk.start[:, None], chunk.counts).reshape(B, K, count, -1, H)

        return quantize_groups(tokens(self.k, chunk.k), tokens(self.v, chunk.v), self.kind.bits)

    def _settled(self) -> "KiviLayer":
        """Return the cache with the chunk's newest tokens in the ring."""
        if self.chunk is None:
            return self
        c, R = self.chunk, self.k.shape[2]
        if c.k.shape[2] == 1:
            k, v = (write(ring, new, c.start % R, c.counts) for ring, new in ((self.k, c.k), (self.v, c.v)))
        else:
            offset = ring_positions(c.start + c.counts, R) - c.start[:, None]
            k, v = (pick(ring, new, offset, c.counts) for ring, new in ((self.k, c.k), (self.v, c.v)))
        return self._replace(k=k, v=v, chunk=None)

    def _replace(self, **changes) -> "KiviLayer":
        fields = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        return KiviLayer(**{**fields, **changes})
