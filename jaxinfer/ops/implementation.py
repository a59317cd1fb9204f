"""Which implementation an op runs: a kernel written for the device, or what XLA makes of the plain formula."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from jaxinfer.ops import cpu_kernels
from pallas_kernels import targets

Implementation = Literal["pallas", "xla"]


def choose(implementation: str | None, pallas: Callable[..., Any], xla: Callable[..., Any], *operands: Any) -> Any:
    """Return `pallas(*operands)` or `xla(*operands)`: the one that is named, or else the best for the target.

    The target is a TPU or a Hopper GPU where JAX has one, where the mesh is of one, or under `assume` of
    `pallas_kernels.chips` or `.gpus`. The kernel is then taken unless it says that it can't do this, and only where the
    program does run there.

    Raises:
        NotImplementedError: "pallas" is named, and there is no kernel for the target or it can't do it; why.
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
        return jax.lax.platform_dependent(*operands, default=xla, **{targets.platform(): pallas})
    except NotImplementedError:
        return xla(*operands)


def with_gradient_of(xla: Callable[..., Any], pallas: Callable[..., Any]) -> Callable[..., Any]:
    """Return `pallas`, a kernel that JAX can't differentiate, with the derivatives of the same formula, `xla`."""

    @jax.custom_jvp
    def run(*operands: Any) -> Any:
        return pallas(*operands)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(xla, primals, tangents)[1]

    return run


def describe() -> str:
    """Return what attention and quantized products run by on this device, in words."""
    name = targets.platform()
    if name is not None:
        which = "TPU" if name == "tpu" else "Hopper GPU"
        return f"Pallas kernels for a {which}, and XLA for shapes that they don't take"
    kind = jax.default_backend()
    if kind == "gpu":
        return f"XLA: the kernels are for Hopper GPUs, and this is {jax.devices()[0].device_kind!r}"
    return "XLA, and machine code for products with few rows" if cpu_kernels.available() else "XLA"


def _obstacle() -> str | None:
    """Return why no kernel can run here, or None."""
    if targets.platform() is None:
        return f"the kernels are for TPUs and Hopper GPUs, and the target is {jax.default_backend()!r}"
    mesh = jax.sharding.get_abstract_mesh()
    free = [name for name in mesh.axis_names if name not in mesh.manual_axes and mesh.shape[name] > 1]
    if free:
        return f"a kernel is not divided over mesh axes {', '.join(free)} by itself; call it under jax.shard_map"
    return None
