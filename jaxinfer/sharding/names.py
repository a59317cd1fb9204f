"""The logical names of the axes of every array in a model or a cache: its node's own; in a model by the shapes."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxinfer.ops.placement import Names
from jaxinfer.ops.quantized import is_quantized
from jaxinfer.tree import path_of

Sizes = tuple[tuple[str, int], ...]  # the axes of a node's weight: their names and sizes


def owner(model: Any, keys: tuple) -> tuple[Any, str]:
    """Return the innermost node on the way to a leaf that names its axes (None: there is none), and the way from it."""
    node, found = model, (None, "")
    for i, key in enumerate(keys):
        if hasattr(node, "axes"):
            found = node, path_of(keys[i:])
        node = node[key.idx] if hasattr(key, "idx") else getattr(node, path_of((key,)))
    return found


def names_of(node: Any, field: str, shape: Sequence[int]) -> Names:
    """Return the names of an array's axes: the node's own where it has as many, else those of the sizes that agree."""
    if field.partition(".")[0] in ("kernel", "table") and len(shape) == len(node.axes):
        return node.axes
    if field == "bias":
        outer, kernel = node.eq.split("->")[1][2:], node.eq.split("->")[0].split(",")[1]
        return tuple(node.axes[kernel.index(letter)] for letter in outer)
    names: list[str | None] = []
    rest = list(sizes_of(node))
    for size in shape:
        at = next((i for i, (_, whole) in enumerate(rest) if whole == size), None)
        names.append(None if at is None else rest[at][0])
        rest = rest if at is None else rest[at + 1 :]
    return tuple(names)


def cache_names(cache: Any) -> list[Names]:
    """Return the names of the axes of each array of a cache, in the order of `jax.tree.leaves`."""
    found = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(cache)[0]:
        node, field = owner(cache, keys)
        names = ("batch", "kv_heads", "sequence") if node is None else node.axes[field.partition(".")[0]]
        found.append((*names, *(None for _ in leaf.shape))[: len(leaf.shape)])
    return found


def sizes_of(node: Any) -> Sizes:
    """Return the names and sizes of the axes of a node's weight."""
    weight = node.kernel if hasattr(node, "kernel") else node.table
    return tuple(zip(node.axes, weight.shape, strict=True))


def axes_of_nodes(model: Any) -> list[Sizes]:
    """Return the names and sizes of every weight's axes, each once."""
    found = {}
    for keys, _ in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)[0]:
        node, _ = owner(model, keys)
        if node is not None:
            found[sizes_of(node)] = None
    return list(found)
