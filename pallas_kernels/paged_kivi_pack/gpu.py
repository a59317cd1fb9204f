"""Packing into pages on a Hopper GPU: the kernel of `kivi_pack`, which finds a group's page in the table."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Interpret, Known
from pallas_kernels.kivi_pack.gpu import pack


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
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
) -> tuple[tuple[Array, ...]]:
    """Return what the contract of this folder says; there are no `blocks` to choose.

    Raises:
        NotImplementedError: a dtype or a size that the kernel does not take.
    """
    del blocks
    source = _Pages(jnp.asarray(table, jnp.int32), [codes, key_grids, value_grids])
    return (pack("paged_kivi_pack", k, v, start, counts, source, group, interpret),)


class _Pages:
    """Groups in the pages of a table, as `kivi_pack.gpu.Rows` has those in rows."""

    def __init__(self, table: Int[Array, "B M"], stores: list[Array]):
        self.kept, self.stores = (table,), stores
        self.groups, self.runs = stores[1].shape[3], stores[2].shape[2] // stores[0].shape[2]
        self.most = table.shape[1] * self.groups

    def find(self, kept: Any, stores: Any, row: Any, index: Any, of: int) -> tuple[Any, list[Any]]:
        """Return a group's place in its page, and the refs of codes, scales and offsets that have it."""
        each = jnp.int32(self.groups)
        number, grids = kept[0][row, jax.lax.div(index, each)], stores[1 + of]
        found = [stores[0].at[number, of], grids.at[number, 0], grids.at[number, 1]]
        return jax.lax.rem(index, each), found
