"""Attention of many tokens over packed groups on a Hopper GPU: XLA unpacks them, `prefill_attention` does the rest."""

from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.calls import Interpret, Known
from pallas_kernels.kivi_attention.reference import dequantize
from pallas_kernels.prefill_attention.gpu import attend_slots


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

    `blocks`: those of `prefill_attention`. The numbers of all slots exist in q's dtype while it runs.

    Raises:
        NotImplementedError: numbers that are not of 16 bits, or heads of over 256.
        ValueError: blocks that need too much shared memory.
    """
    keys, values = dequantize(k_codes, v_codes, k_scale, k_offset, v_scale, v_offset, group)
    return attend_slots(
        "kivi_prefill_attention", q, keys.astype(q.dtype), values.astype(q.dtype), scale=scale, position=position,
        length=length, window=window, softcap=softcap, return_lse=return_lse, blocks=blocks, interpret=interpret,
        packed=(group, residual),
    )  # fmt: skip
