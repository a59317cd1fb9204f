"""Root-mean-square normalization, alone and of the sum that a residual becomes."""

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxinfer.ops.implementation import choose, with_gradient_of
from pallas_kernels import rms_norm as kernels
from pallas_kernels import targets

FEW_ROWS, WIDE = 64, 1024  # with which what launches cost is most of the time; else XLA makes one kernel by itself


def rms_norm(
    x: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float, implementation: str | None = None
) -> Float[Array, "*B D"]:
    """Return `x / sqrt(mean(x^2) + eps) * scale` over the last axis, computed in float32 (1910.07467)."""
    return _normed(implementation, eps, x, scale)


def add_rms_norm(
    x: Float[Array, "*B D"], y: Float[Array, "*B D"], scale: Float[Array, "D"], eps: float,
    implementation: str | None = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:  # fmt: skip
    """Return `x + y` and its `rms_norm`."""
    return _normed(implementation, eps, x, scale, y)


def _normed(implementation: str | None, eps: float, x: Array, scale: Array, *add: Array) -> Any:
    def xla(x: Array, scale: Array, *add: Array) -> Any:
        return kernels.reference(x, scale, eps=eps, add=add[0] if add else None)

    def pallas(x: Array, scale: Array, *add: Array) -> Any:
        rows = [a.reshape(-1, a.shape[-1]) for a in (x, *add)]
        found = targets.kernel(kernels)(rows[0], scale, eps=eps, add=rows[1] if add else None)
        return jax.tree.map(lambda a: a.reshape(x.shape), found)

    D = x.shape[-1]
    if implementation is None and (x.size > FEW_ROWS * D or D < WIDE):
        implementation = "xla"
    return choose(implementation, with_gradient_of(xla, pallas), xla, x, scale, *add)
