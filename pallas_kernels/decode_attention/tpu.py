"""Decode attention on TPU over a dense cache."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import chips, tuning
from pallas_kernels.calls import Interpret, Known
from pallas_kernels.decode_attention.rows import attend_rows
from pallas_kernels.decode_attention.stores import Dense


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    length: Int[Known, "B"],
    *,
    scale: float,
    start: Int[Known, "B"] | None = None,
    position: Int[Known, "B"] | None = None,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    tree: Bool[Known, "... T T"] | None = None,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    return_lse: bool = False,
    ring: bool = False,
    blocks: dict[str, int] | None = None,
    interpret: Interpret = False,
):
    """Return what the contract of this folder says.

    `blocks`: slots a copy, key heads a copy, buffers, splits; by default those tuned for the chip.

    Raises:
        NotImplementedError: a ring, or more slots than a block holds, of which no block of whole tiles is a divisor.
        ValueError: blocks that need too much VMEM.
    """
    if ring:
        raise NotImplementedError("ring: must be a cache of all slots on a TPU")
    _, K, S, H = k.shape
    chip = chips.current()
    chosen = blocks or tuning.fitting(
        tuning.blocks("decode_attention", chip.name, shape_class(q, k, window=window)),
        2 * min(K, 8) * H * k.dtype.itemsize,
        chip,
    )
    tile = 128 if k_scale is not None else 16 if k.dtype.itemsize == 2 else 32
    store = Dense(
        k, v, k_scale, v_scale,
        slots=fit_block(chosen["slots"], S, tile), heads=math.gcd(chosen["heads"], K), depth=chosen["buffers"],
    )  # fmt: skip
    out, lse, _ = attend_rows(
        "decode_attention", q, store, K, S, length, scale=scale, start=start, position=position, window=window,
        sinks=sinks, softcap=softcap, tree=tree, return_lse=return_lse, splits=chosen["splits"], interpret=interpret,
    )  # fmt: skip
    return (out, lse) if return_lse else out


def shape_class(q: Any, k: Any, *_, window: int | None = None, **__) -> dict[str, int | str]:
    """Return the key of the tuned table: what the cache's numbers are, its shape, and the window."""
    _, K, S, H = k.shape
    return {**numbers(k), "K": K, "S": S, "H": H, "window": min(window or S, S)}


def numbers(x: Any) -> dict[str, int | str]:
    """Return what an array's numbers are: their form and their bits."""
    form = "integer" if jnp.issubdtype(x.dtype, jnp.integer) else "float"
    return {"form": form, "bits": 8 * jnp.dtype(x.dtype).itemsize}


def fit_block(slots: int, S: int, tile: int) -> int:
    """Return the most slots, at most `slots`, in whole tiles that divide S; all S where one block holds them.

    Raises:
        NotImplementedError: there is no such number.
    """
    if slots >= S:
        return S
    for size in range(slots - slots % tile, 0, -tile):
        if S % size == 0:
            return size
    raise NotImplementedError(f"{S} cache slots: must be a multiple of {tile}, or at most {slots}")
