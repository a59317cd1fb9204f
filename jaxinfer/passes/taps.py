"""Statistics of what flows into each linear map of a layer, taken while the layer runs."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.models.layers import Linear
from jaxinfer.models.moe import Experts
from jaxinfer.tree import rewrite_by_path

Totals = Mapping[str, Mapping[str, Array]]


def _absmax(rows: Float[Array, "M I"]) -> Float[Array, "I"]:
    return jnp.abs(rows).max(axis=0)


def _sum_abs(rows: Float[Array, "M I"]) -> Float[Array, "I"]:
    return jnp.abs(rows).sum(axis=0)


def _second_moment(rows: Float[Array, "M I"]) -> Float[Array, "I I"]:
    return jnp.matmul(rows.T, rows, preferred_element_type=jnp.float32)


# name: (of rows; how two parts are joined; whether the total is divided by the tokens)
STATISTICS: dict[str, tuple[Callable[[Array], Array], Callable[[Array, Array], Array], bool]] = {
    "absmax": (_absmax, jnp.maximum, False),  # max |x_j|
    "mean_abs": (_sum_abs, jnp.add, True),  # mean |x_j|
    "hessian": (_second_moment, jnp.add, True),  # mean x x^T
}


@nnx.dataclass
class Tap(nnx.Module):
    """A linear map, or experts, that hands what it is given to `found` before it runs."""

    node: nnx.Module = nnx.data()
    path: str = nnx.static(kw_only=True)
    found: Any = nnx.static(kw_only=True)  # a list that lives as long as one trace

    @property
    def kernel(self) -> Any:
        """The map's kernel."""
        return self.node.kernel

    def __call__(self, x: Float[Array, "..."], *group_sizes: Int[Array, "E"]) -> Float[Array, "..."]:
        self.found.append((self.path, x, *group_sizes))
        return self.node(x, *group_sizes)


def totals(layer: Any, run: Callable[[Any], Array], wants: tuple[str, ...]) -> tuple[Totals, dict[str, Array]]:
    """Return each linear map's statistics summed over the rows that `run(layer)` feeds it, and how many rows."""
    found: list = []
    tapped = rewrite_by_path(layer, (Linear, Experts), ".*", lambda path, node: Tap(node, path=path, found=found))
    run(tapped)
    out, counts = {}, {}
    for path, x, *group_sizes in found:
        rows = x.astype(jnp.float32).reshape(-1, x.shape[-1] if group_sizes else math.prod(x.shape[2:]))
        if group_sizes:
            out[path] = {name: _by_expert(STATISTICS[name][0], rows, group_sizes[0]) for name in wants}
            counts[path] = group_sizes[0].astype(jnp.float32)
        else:
            out[path] = {name: STATISTICS[name][0](rows) for name in wants}
            counts[path] = jnp.float32(rows.shape[0])
    return out, counts


def _by_expert(statistic: Callable[[Array], Array], rows: Array, group_sizes: Int[Array, "E"]) -> Array:
    expert = jnp.repeat(jnp.arange(len(group_sizes)), group_sizes, total_repeat_length=rows.shape[0])
    return jax.lax.map(lambda e: statistic(jnp.where((expert == e)[:, None], rows, 0)), jnp.arange(len(group_sizes)))
