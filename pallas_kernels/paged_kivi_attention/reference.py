"""Attention over pages of packed groups in plain jax: rows' pages are gathered, `kivi_attention` does the rest."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Known
from pallas_kernels.kivi_attention.reference import kivi_attention


def paged_kivi_attention(
    q: Float[Array, "B T N H"],
    codes: UInt8[Array, "P 2 K bytes H"],
    key_grids: Float[Array, "P 2 K groups H"],
    value_grids: Float[Array, "P 2 KR page"],
    table: Int[Known, "B M"],
    length: Int[Known, "B"],
    *,
    scale: float,
    group: int,
    position: Int[Known, "B"],
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
):
    """Return what the contract of this folder says, in q's dtype."""
    table, length = jnp.asarray(table), jnp.asarray(length)
    M, page = table.shape[1], value_grids.shape[3]
    table = jnp.where(jnp.arange(M) * page < length[:, None], table, 0)

    def rows(x):
        """Return the pages' second last axis in one, `[B, K, M * own, H]`."""
        x = x[table].swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, x.shape[4])

    def lines(x):
        """Return the pages' last axis in one, `[B, KR, S]`."""
        x = x[table].transpose(0, 2, 1, 3)
        return x.reshape(*x.shape[:2], -1)

    return kivi_attention(
        q, *(rows(codes[:, i]) for i in (0, 1)), *(rows(key_grids[:, i]) for i in (0, 1)),
        *(lines(value_grids[:, i]) for i in (0, 1)), length, scale=scale, group=group, position=position,
        window=window, softcap=softcap, return_lse=return_lse,
    )  # fmt: skip
