"""Collectives of a step by the architecture and the mesh alone: for machines and settings that nothing is compiled for.

Held against the compiled ones in tests: two all-reduces a layer of hidden states in the model's type. (Where XLA
multiplies int8 weights, with more rows than the kernel takes, it adds the sums up in float32: twice the bytes.)
"""

import collections
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.plan.building import Built
from jaxinfer.plan.hlo import Collective
from jaxinfer.sharding.specs import shard_bytes


def estimated_collectives(built: Built, rows: int, tokens: int) -> dict[Collective, float | int]:
    """Return the collectives of a step of `rows` rows of `tokens` new tokens."""
    config, model, sizes = built.model.config, built.model, built.sizes
    found: collections.Counter[Collective] = collections.Counter()
    over_rows = built.rules.mesh_axes("batch", sizes)
    local = rows / built.ways("batch", rows) * tokens  # tokens of a device
    hidden = int(local * config.embed_dim)

    def over(name: str) -> tuple[str, ...]:
        return tuple(a for a in built.rules.mesh_axes(name, sizes) if a not in over_rows)

    def add(kind: str, size: float | int, axes: Sequence[str], times: float | int = 1) -> None:
        if math.prod(sizes[a] for a in axes) > 1 and size:
            found[Collective(kind, int(size), group(sizes, axes))] += times

    sums = hidden * jnp.dtype(model.embed.table.dtype).itemsize
    add("all-reduce", sums, over("vocab"))
    for i in range(config.num_layers):
        add("all-reduce", sums, over("heads"))
        wide = tuple(dict.fromkeys((*over("experts"), *over("mlp")))) if config.is_moe(i) else over("mlp")
        add("all-reduce", sums, wide)
    stored = tuple(a for a in built.rules.mesh_axes("embed", sizes) if a in over_rows)
    if stored:
        leaves, lies = jax.tree.leaves(model.layers), jax.tree.leaves(built.shardings.layers)
        add("all-gather", shard_bytes(leaves, lies) * math.prod(sizes[a] for a in stored), stored)
    return dict(found)


def group(sizes: dict[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """Return the first group of devices along some axes of a mesh, as places in it."""
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return tuple(places[tuple(slice(None) if a in axes else 0 for a in sizes)].reshape(-1).tolist())
