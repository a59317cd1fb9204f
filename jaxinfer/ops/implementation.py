"""Which implementation an op runs: a kernel written for the device, or what XLA makes of the plain formula."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from pallas_kernels import chips

Implementation = Literal["pallas", "xla"]


def choose(implementation: str | None, pallas: Callable[..., Any], xla: Callable[..., Any], *operands: Any) -> Any:
    """Return `pallas(*operands)` or `xla(*operands)`: the one that is named, or else the best for the target.

    The target is a TPU where JAX has one, where the mesh is of one, or under `pallas_kernels.chips.assume`. The kernel
    is then taken unless it says that it can't do this, and only where the program does run on a TPU.

    Raises:
        NotImplementedError: "pallas" is named, and the target is no TPU or the kernel can't do it; why.
        ValueError: another name.
    """
    if implementation not in (None, "pallas", "xla"):
        raise ValueError(f"implementation={implementation!r}: must be 'pallas', 'xla' or None (the best)")
    if implementation == "xla":
        return xla(*operands)
    why = _obstacle()
    if implementation == "pallas":
        if why:
            raise NotImplementedError(f"implementation='pallas': {why}")
        return pallas(*operands)
    if why:
        return xla(*operands)
    try:
        return jax.lax.platform_dependent(*operands, tpu=pallas, default=xla)
    except NotImplementedError:
        return xla(*operands)


def _obstacle() -> str | None:
    """Return why no kernel can run here, or None."""
    if chips.target() is None:
        return f"the kernels are for TPUs, and the target is {jax.default_backend()!r}"
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in mesh.axis_names if name not in mesh.manual_axes and mesh.shape[name] > 1]
    if free:
        return f"a kernel is not divided over mesh axes {', '.join(free)} by itself; call it under jax.shard_map"
    return None
