"""Packing the groups that new tokens complete."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxinfer.cache.groups import Groups, quantize_groups
from jaxinfer.cache.packed_pages import PackedPages
from jaxinfer.cache.ring import Ring
from jaxinfer.ops.implementation import Implementation, choose
from pallas_kernels import kivi_pack, paged_kivi_pack, targets

ARRAYS = ("k_codes", "k_scale", "k_offset", "v_codes", "v_scale", "v_offset")  # of groups, as the kernel takes them


def pack_completed(
    groups: Groups | PackedPages,
    recent: Ring,
    start: Int[Array, "B"],
    counts: Int[Array, "B"],
    tokens: int,
    implementation: Implementation | None = None,
) -> Groups | PackedPages:
    """Return the groups with those packed that new tokens complete.

    `recent` has them, counts[b] of at most `tokens` from position start[b], and those before them in their groups.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    xla = _by_rows if tokens <= groups.size else functools.partial(_at_once, tokens=tokens)
    return choose(implementation, functools.partial(_by_kernel, tokens=tokens), xla, groups, recent, start, counts)


def _by_kernel(
    groups: Groups | PackedPages, recent: Ring, start: Array, counts: Array, tokens: int
) -> Groups | PackedPages:
    if groups.bits != 4:
        raise NotImplementedError(f"codes of {groups.bits} bits: must be of 4")
    if recent.chunk is not None or tokens > groups.size:
        raise NotImplementedError(f"{tokens} new tokens: must be few, and at most a group's {groups.size}")
    new = recent.k, recent.v, start, counts
    if isinstance(groups, PackedPages):
        pages = groups.codes, groups.key_grids, groups.value_grids
        (found,) = targets.kernel(paged_kivi_pack)(*new, groups.table, *pages, group=groups.size)
        return PackedPages(*found, groups.table)
    (found,) = targets.kernel(kivi_pack)(*new, *(getattr(groups, x) for x in ARRAYS), group=groups.size)
    return Groups(**dict(zip(ARRAYS, found, strict=True)))


def _by_rows(groups: Groups | PackedPages, recent: Ring, start: Array, counts: Array) -> Groups | PackedPages:
    """Pack one group of a row at most.

    Only rows that complete theirs do anything, one by one and in place: a step has few of them, and to write all rows
    at once would copy the groups.
    """
    first, complete = _completed(groups, start, counts)
    complete = (complete > 0) & (first < groups.count)
    rows = jnp.argsort(~complete)

    def pack(i: Array, groups: Groups | PackedPages) -> Groups | PackedPages:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=rows[i], slice_size=1)
        new = _quantized(groups, *jax.tree.map(cut, (recent, start)), 1)
        return groups.write_one(new, rows[i], first[rows[i]])

    return jax.lax.fori_loop(0, complete.sum(), pack, groups)


def _at_once(
    groups: Groups | PackedPages, recent: Ring, start: Array, counts: Array, tokens: int
) -> Groups | PackedPages:
    """Pack all that so many tokens can complete."""
    first, complete = _completed(groups, start, counts)
    return groups.write(_quantized(groups, recent, start, -(-tokens // groups.size)), first, complete)


def _completed(groups: Groups | PackedPages, start: Array, counts: Array) -> tuple[Array, Array]:
    """Return the group that each row's new tokens begin in, and how many from there on they complete."""
    first = start // groups.size
    return first, (start + counts) // groups.size - first


def _quantized(groups: Groups | PackedPages, recent: Ring, start: Array, count: int) -> Groups:
    """Return `count` groups of each row from the one that position start[b] is in."""
    (B, K, _, H), G = recent.k.shape, groups.size
    positions = (start // G * G)[:, None] + jnp.arange(count * G)
    k, v = (x.reshape(B, K, count, G, H) for x in recent.read(positions))
    return quantize_groups(k, v, groups.bits)
