"""w8a8 with the input features that have outliers kept in full precision: their columns cost bytes, not accuracy.

The paper looks for features above the threshold in every batch. Here calibration finds them once: the shapes are
static, a token's result does not depend on its neighbours, and only these columns, not the whole kernel, are kept.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Leaf, Linear
from jaxinfer.models.moe import Experts
from jaxinfer.ops.einsum import einsum
from jaxinfer.ops.einsum_integer import einsum_int8
from jaxinfer.passes.base import About
from jaxinfer.passes.quantization.calibrated import CalibratedWeights, round_int8
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.passes.quantization.weights import outputs_first
from jaxinfer.tree import rewrite_by_path, select


@nnx.dataclass
class OutlierLinear(DynamicLinear):
    """A linear map in two products: of integers, and of the few input features that have columns of their own."""

    outliers: Leaf = nnx.data(kw_only=True)  # [..., k], outputs first: the columns in full precision
    columns: Leaf = nnx.data(kw_only=True)  # [k], which features of the flattened inputs; past the last: an unused one

    def __call__(self, x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
        few, rest = split(x.reshape(*x.shape[:2], -1), self.columns)
        outer = self.eq.split("->")[1][2:]
        y = einsum_int8(self.eq, rest.reshape(x.shape), self.kernel, axes=self.axes)
        y = y + einsum(f"bti,{outer}i->bt{outer}", few, self.outliers)
        return y if self.bias is None else y + self.bias.astype(y.dtype)


@nnx.dataclass
class OutlierExperts(DynamicExperts):
    """Experts in two products, as `OutlierLinear`; all experts keep the same features."""

    outliers: Leaf = nnx.data(kw_only=True)  # [E, O, k]
    columns: Leaf = nnx.data(kw_only=True)  # [k]

    def __call__(self, rows: Float[Array, "M I"], group_sizes: Int[Array, "E"]) -> Float[Array, "M O"]:
        few, rest = split(rows, self.columns)
        y = jax.lax.ragged_dot(few, self.outliers.swapaxes(1, 2), group_sizes, preferred_element_type=jnp.float32)
        return super().__call__(rest, group_sizes) + y.astype(rows.dtype)


def split(x: Float[Array, "*B I"], columns: Int[Array, "k"]) -> tuple[Float[Array, "*B k"], Float[Array, "*B I"]]:
    """Return the features that have columns of their own, and x with these at zero, so that no scale sees them."""
    few = jnp.take(x, columns, axis=-1, mode="fill", fill_value=0)
    return few, jnp.where((jnp.arange(x.shape[-1])[:, None] == columns).any(axis=1), 0, x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LLMInt8(CalibratedWeights):
    """Keep the columns of up to `features` inputs whose magnitude reaches `threshold`; int8 times int8 for the rest."""

    name: ClassVar[str] = "llm_int8"
    about: ClassVar[About] = About(
        family="quantization",
        paper="2208.07339",
        degenerate={"threshold": 0.0, "features": None, "embedding": False},
        bound=0.02,
        rounds_activations=True,
        takes="kernels",
    )
    wants: ClassVar[tuple[str, ...]] = ("absmax",)
    linear = DynamicLinear
    table = DynamicEmbedding
    threshold: float = 6.0  # the largest magnitude of an outlier feature in calibration is at least this
    features: int | None = 8  # columns kept, used or not, a linear map; None is room for all of them

    def visit(self, block: Any, stats: Mapping[str, Mapping[str, Array]]) -> Any:
        """Return the layer with its linear maps in two products.

        Raises:
            InputError: a negative `threshold`, or `features` below 1.
        """
        if not self.threshold >= 0:
            raise InputError(f"threshold={self.threshold}: must be 0 or more")
        if self.features is not None and self.features < 1:
            raise InputError(f"features={self.features}: must be 1 or more; w8a8 keeps none")
        if not any(self.chooses(path) for path in select(block, (Linear, Experts))):
            return block

        def divide(path: str, node: Linear | Experts) -> Linear | Experts:
            return self._divide(node, stats[path]["absmax"]) if self.chooses(path) else node

        return rewrite_by_path(block, (Linear, Experts), ".*", divide)

    def _divide(self, node: Linear | Experts, absmax: Float[Array, "*E I"]) -> OutlierLinear | OutlierExperts:
        node, kernel, inputs = outputs_first(node)
        absmax = absmax.reshape(-1, absmax.shape[-1]).max(axis=0)
        I = absmax.size
        largest, columns = jax.lax.top_k(absmax, I if self.features is None else min(self.features, I))
        columns = jnp.sort(jnp.where(largest >= self.threshold, columns, I)).astype(jnp.int32)
        flat = kernel.reshape(*kernel.shape[: kernel.ndim - inputs], I)
        few, rest = split(flat, columns)
        leaf = round_int8(rest.reshape(kernel.shape), inputs, "int8")
        if isinstance(node, Experts):
            axes = (node.axes[0], node.axes[2], node.axes[1])
            return OutlierExperts(leaf, axes=axes, outliers=few, columns=columns)
        return OutlierLinear(leaf, bias=node.bias, eq=node.eq, axes=node.axes, outliers=few, columns=columns)
