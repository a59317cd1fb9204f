"""Weights in 4 bits, each rounding error made up for by the weights not yet rounded: int4's bytes, less of its loss.

Calibration text decides what an error costs, so the text should look like the use.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Float

from jaxinfer.errors import InputError
from jaxinfer.ops.quantized import Quantized
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.awq_search import LEVELS, search_range
from jaxinfer.passes.quantization.calibrated import CalibratedWeights
from jaxinfer.passes.quantization.gptq_rounding import gptq_codes
from jaxinfer.passes.quantization.rounding import fit_group, leaf, scales


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(CalibratedWeights):
    """Round the columns of a weight one after another, each error moved to the others by the inputs' second moments."""

    name: ClassVar[str] = "gptq"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2210.17323",
        degenerate={"skip": ".*", "embedding": False},
        bound=0.15,
        takes="kernels",
    )
    wants: ClassVar[tuple[str, ...]] = ("hessian",)
    group: int = 64  # inputs that share a scale
    symmetric: bool = True  # without an offset
    clip: bool = True  # search each group's range first, by what it costs at the output
    act_order: bool = True  # inputs of large second moment first
    damp: float = 0.01  # added to the diagonal of the second moments, in units of its mean

    def visit(self, block: Any, stats: Mapping[str, Mapping[str, Array]]) -> Any:
        """Return the layer with its kernels rounded.

        Raises:
            InputError: `damp` is not positive, or `group` does not divide a kernel's inputs.
        """
        if not self.damp > 0:
            raise InputError(f"damp={self.damp}: must be above 0, second moments of few tokens have no inverse")

        def round_kernel(kernel: Array, inputs: int, path: str) -> Quantized:
            group = fit_group(self.group, kernel.shape, inputs, path)
            how = dict(group=group, symmetric=self.symmetric, clip=self.clip)
            return gptq(kernel, inputs, stats[path]["hessian"], **how, act_order=self.act_order, damp=self.damp)

        return self.quantize(block, round_kernel)


@functools.partial(jax.jit, static_argnames=("inputs", "group", "symmetric", "clip", "act_order", "damp"))
def gptq(
    kernel: Float[Array, "..."],
    inputs: int,
    hessian: Float[Array, "*E I I"],
    *,
    group: int,
    symmetric: bool = True,
    clip: bool = True,
    act_order: bool = True,
    damp: float = 0.01,
) -> Quantized:
    """Return a kernel, outputs first with its last `inputs` axes contracted, as 4-bit codes rounded by `gptq_codes`.

    Experts have a leading axis, in the kernel as in the Hessian; they are rounded one at a time.
    """
    qtype = "int4" if symmetric else "uint4"
    experts = hessian.ndim == 3
    flat = kernel.astype("float32").reshape(*kernel.shape[:experts], -1, hessian.shape[-1])
    scale, offset = (
        # The codes must fit the scale as it is stored, which may be rounded.
        None if part is None else part.astype(kernel.dtype).astype("float32")
        for part in (search_range(flat, hessian, qtype, group) if clip else scales(flat, qtype, group))
    )
    run = lambda one: gptq_codes(*one, LEVELS[qtype], act_order=act_order, damp=damp)  # noqa: E731
    each = (flat, hessian, scale, offset)
    codes = jax.lax.map(run, each) if experts else run(each)
    return leaf(codes, scale, offset, qtype, kernel.shape, inputs, kernel.dtype)
