"""Collectives of a step by the architecture and the mesh alone: for machines and settings that nothing is compiled for.

Held against the compiled ones in tests: two all-reduces a layer of hidden states in the model's type. (Where XLA
multiplies int8 weights, with more rows than the kernel takes, it adds the sums up in float32: twice the bytes.)
In stages those of a stage's layers, and a hand-over to the next stage, in every turn; in the end the last
one's go to the first, and from there to all.
"""

import collections
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.models.transformer import Attention
from jaxinfer.plan.building import Built
from jaxinfer.plan.hlo import Collective
from jaxinfer.plan.turns import turns_of
from jaxinfer.sharding.specs import shard_bytes
from jaxinfer.sharding.staged_cache import STAGE
from jaxinfer.tree import select

LAUNCHES = 14  # of a layer, about: its products, norms, attention and cache, and what XLA fuses between them


def estimated_launches(built: Built) -> int:
    """Return about how many kernels a step launches."""
    return LAUNCHES * len(built.model.layers)


def estimated_collectives(built: Built, rows: int, tokens: int) -> dict[Collective, float | int]:
    """Return the collectives of a step of `rows` rows of `tokens` new tokens."""
    config, model, sizes = built.model.config, built.model, built.sizes
    found: collections.Counter[Collective] = collections.Counter()
    over_rows = built.rules.mesh_axes("batch", sizes)
    turns = turns_of(built, rows, tokens)
    each = tokens // turns.pieces
    wide = rows / built.ways("batch", rows) * config.embed_dim * jnp.dtype(model.embed.table.dtype).itemsize

    def over(name: str) -> tuple[str, ...]:
        return tuple(a for a in built.rules.mesh_axes(name, sizes) if a not in over_rows)

    def add(kind: str, size: float | int, axes: Sequence[str], times: float | int = 1) -> None:
        if math.prod(sizes[a] for a in axes) > 1 and size:
            found[Collective(kind, int(size), group(sizes, axes))] += times

    hidden, sums = wide * built.tokens(tokens), wide * built.tokens(each)  # of a device, of a piece
    add("all-reduce", hidden, over("vocab"))
    for i in range(len(model.layers)):
        add("all-reduce", sums, over("heads"), turns.count)
        widths = tuple(dict.fromkeys((*over("experts"), *over("mlp")))) if config.is_moe(i) else over("mlp")
        add("all-reduce", sums, widths, turns.count)
    for kind, size, times in _of_context(built, rows, each):
        axes = built.rules.mesh_axes("sequence", sizes)
        places = group(sizes, axes)
        found[Collective(kind, size, places[:2] if kind == "collective-permute" else places)] += times * turns.count
    if turns.stages > 1:
        places = group(sizes, (STAGE,))
        found[Collective("collective-permute", int(sums), places[:2])] += turns.count
        found[Collective("collective-permute", int(hidden), (places[-1], places[0]))] += 1
        add("all-reduce", hidden, (STAGE,))
        if turns.pieces > 1:  # a piece is cut from what a context divides, and put back into it, where it is whole
            tokens_over = built.rules.token_axes(each, sizes)
            add("all-gather", wide * tokens, tokens_over, turns.count)
            add("all-gather", wide * each, tokens_over, turns.count)
    stored = tuple(a for a in built.rules.mesh_axes("embed", sizes) if a in over_rows)
    if stored:
        leaves, lies = jax.tree.leaves(model.layers), jax.tree.leaves(built.shardings.layers)
        add("all-gather", shard_bytes(leaves, lies) * math.prod(sizes[a] for a in stored), stored, turns.count)
    return dict(found)


def _of_context(built: Built, rows: int, tokens: int) -> Iterator[tuple[str, int, int]]:
    """Yield the kind, bytes and number of the collectives of all layers that a divided context takes.

    Of few tokens parts of attention are merged: a maximum, and sums of float32. Of many, new keys and values go to
    the devices of their slots, and queries with what they have gathered go round.
    """
    config, ways = built.model.config, math.prod(built.sizes[a] for a in built.rules.mesh_axes("sequence", built.sizes))
    if ways == 1:
        return
    of_rows = rows // built.ways("batch", rows)
    own, size = built.tokens(tokens), jnp.dtype(built.model.embed.table.dtype).itemsize
    lse = of_rows * own * config.num_heads // built.ways("heads", config.num_heads) * 4
    out, layers = lse * config.head_dim, len(built.model.layers)
    if own == tokens:
        yield "all-reduce", lse, layers
        yield "all-reduce", out + lse, layers
        return
    for node in select(built.model, Attention).values():
        key_heads = node.num_kv_heads // built.ways("kv_heads", node.num_kv_heads)
        yield "all-gather", of_rows * tokens * key_heads * config.head_dim * size, 2
    yield "collective-permute", out * size // 4, layers * ways  # queries, and in the end what comes of them
    yield "collective-permute", out, layers * (ways - 1)
    yield "collective-permute", lse, layers * (ways - 1)


def group(sizes: dict[str, int], axes: Sequence[str]) -> tuple[int, ...]:
    """Return the first group of devices along some axes of a mesh, as places in it."""
    places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return tuple(places[tuple(slice(None) if a in axes else 0 for a in sizes)].reshape(-1).tolist())
