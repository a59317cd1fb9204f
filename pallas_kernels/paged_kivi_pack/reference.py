"""Packing into pages in plain jax."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Known
from pallas_kernels.kivi_pack.reference import completed, packed, tokens


def paged_kivi_pack(
    k: Float[Array, "B K R H"],
    v: Float[Array, "B K R H"],
    start: Int[Known, "B"],
    counts: Int[Known, "B"],
    table: Int[Known, "B M"],
    codes: UInt8[Array, "P 2 K bytes H"],
    key_grids: Float[Array, "P 2 K groups H"],
    value_grids: Float[Array, "P 2 KR page"],
    *,
    group: int,
) -> tuple[tuple[Array, ...]]:
    """Return what the contract of this folder says."""
    each, table = key_grids.shape[3], jnp.asarray(table)
    index, complete = completed(start, counts, group, table.shape[1] * each)
    new = packed(*(tokens(ring, index, group) for ring in (k, v)), value_grids.shape[2] // v.shape[1])
    number = jnp.take_along_axis(table, jnp.where(complete, index // each, 0)[:, None], axis=1)[:, 0]
    number = jnp.where(complete, number, len(codes))  # past the end: dropped
    arrays = ((codes, (0, 3)), (key_grids, (1, 2)), (value_grids, (4, 5)))
    return (tuple(_put(old, [new[i] for i in of], number, index % each, each) for old, of in arrays),)


def _put(pages: Array, new: list[Array], number: Array, place: Array, each: int) -> Array:
    """Return pages of `each` groups with the two `new` parts of a group of each row at its place in its page."""
    own = pages.shape[3] // each
    slots = (place[:, None] * own + jnp.arange(own))[:, None, None]
    at = number[:, None, None, None], jnp.arange(2)[:, None, None], jnp.arange(pages.shape[2])[:, None], slots
    together = jnp.stack(new, axis=1)
    return pages.at[at].set(together.reshape(*together.shape[:3], own, *pages.shape[4:]), mode="drop")
