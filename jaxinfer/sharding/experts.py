"""A mixture of experts on a mesh: each device runs the experts that it holds, on the tokens that picked them."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.models.layers import ACTIVATIONS
from jaxinfer.models.moe import MoE
from jaxinfer.ops.placement import current_rules, first_entry, free_axes
from jaxinfer.sharding.names import names_of, owner


@nnx.dataclass
class DividedMoE(MoE):
    """The mixture under `shard_map` over the axes that divide experts or tokens; the same where there are none.

    Rows are whole on all devices that share them, so none is sent: a device leaves out what is not for its experts,
    and the devices' outputs are summed.
    """

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        mesh, rules = free_axes(), current_rules()
        E = self.gate.kernel.shape[0]
        over = () if rules is None else first_entry(rules.spec(("experts",), (E,), mesh))
        tokens = () if rules is None else rules.token_axes(x.shape[1], mesh)
        if not over and not tokens:
            return super().__call__(x)
        rows = tuple(a for a in first_entry(rules.spec(("batch",), (x.shape[0],), mesh)) if a not in over)
        weights, experts = (part.reshape(*x.shape[:2], -1) for part in self.route(x))
        parts = (self.gate, self.up, self.down)

        def spec(keys: tuple, leaf: Array) -> PartitionSpec:
            node, field = owner(parts, keys)
            names = () if node is None else names_of(node, field, leaf.shape)
            return PartitionSpec(*(over if name == "experts" else None for name in names))

        def run(parts: tuple, x: Array, weights: Array, experts: Array) -> Array:
            first = jax.lax.axis_index(over) * (E // math.prod(mesh[axis] for axis in over)) if over else 0
            y = _run(parts, x, weights, experts - first, self.activation)
            return (jax.lax.psum(y, over) if over else y).astype(x.dtype)

        along = PartitionSpec(rows, tokens)
        return jax.shard_map(
            run,
            in_specs=(jax.tree_util.tree_map_with_path(spec, parts), along, along, along),
            out_specs=along,
            axis_names={*rows, *tokens, *over},
            check_vma=False,
        )(parts, x, weights, experts)


def _run(
    parts: tuple[Any, Any, Any],
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T k"],
    experts: Int[Array, "B T k"],
    activation: str,
) -> Float[Array, "B T D"]:
    """Return, in float32, what the experts 0 .. E - 1 of `parts` contribute; others have another number."""
    gate, up, down = parts
    B, T, D = x.shape
    k, E = experts.shape[2], gate.kernel.shape[0]
    index = jnp.where((experts >= 0) & (experts < E), experts, E).reshape(-1)
    order = jnp.argsort(index, stable=True)  # rows of one expert become neighbours, and those of others come last
    rows = x.reshape(B * T, D)[order // k]
    group_sizes = jnp.bincount(index, length=E + 1).astype(jnp.int32)[:E]
    hidden = ACTIVATIONS[activation](gate(rows, group_sizes)) * up(rows, group_sizes)
    mine = jnp.arange(len(order)) < group_sizes.sum()
    out = jnp.where(mine[:, None], down(hidden, group_sizes), 0) * weights.reshape(-1)[order][:, None].astype(x.dtype)
    return out[jnp.argsort(order)].astype(jnp.float32).reshape(B, T, k, D).sum(axis=2)
