"""How far a query sees, on any chip: to itself, or where slots are packed groups to those packed for its position."""

from typing import Any

import jax.numpy as jnp

from pallas_kernels.calls import div

Packed = tuple[int, int]  # a group's tokens and the residual: see `kivi_prefill_attention`


def reach(at: Any, packed: Packed | None) -> Any:
    """Return the slot that a query at a position sees up to, not included."""
    if packed is None:
        return at + 1
    group, residual = packed
    return div(jnp.maximum(at + 1 - residual, 0), group) * group
