"""The sharding of every leaf of a model or a cache, from the logical names of its axes: no leaf has code of its own."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxinfer.cache.base import Cache
from jaxinfer.ops.placement import Rules
from jaxinfer.ops.quantized import FOUR_BIT, RUN, Packed, is_quantized
from jaxinfer.sharding.fitting import check_fits
from jaxinfer.sharding.names import cache_names, names_of, owner
from jaxinfer.sharding.staged_cache import StagedLayer, staged
from jaxinfer.sharding.stages import leaf_mesh
from jaxinfer.tree import path_of, replace


def model_shardings(model: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Return the model's tree with a NamedSharding for each leaf, within its stage; shapes are enough.

    A kernel's axes have their names on its node. Scales, offsets, packed values and whatever else a pass keeps beside
    it get the names of the axes that they share, by their shapes; what shares none lies whole on every device.

    Raises:
        InputError: a size that must be divided is not, or the layout is one that can't be; see `fitting.fit`.
    """
    check_fits(model, mesh, rules)
    specs = model_specs(model, dict(mesh.shape), rules)
    return jax.tree.unflatten(jax.tree.structure(model), [NamedSharding(mesh, spec) for spec in specs])


def model_specs(model: Any, sizes: Mapping[str, int], rules: Rules) -> list[PartitionSpec]:
    """Return the spec of each leaf within its stage, in the order of `jax.tree.leaves`."""
    specs = []
    for keys, leaf in jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)[0]:
        node, field = owner(model, keys)
        for part, divided in _parts(leaf):
            names = (None,) * len(divided) if node is None else names_of(node, field, part.shape)
            specs.append(rules.spec(names, divided, sizes))
    return specs


def sharding_of(model: Any, mesh: Mesh, rules: Rules) -> Callable[[str, Any], NamedSharding]:
    """Return where `checkpoint.assemble` is to put an array, by its leaf's path and its shape.

    The model need not fit the mesh: what is not divided is whole, until `shard` has made it fit. A layer's arrays go to
    the devices of its stage, and to no other.
    """
    whole = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)[0]
    parts = [(path_of(keys), part.shape) for keys, leaf in whole for part in jax.tree.leaves(leaf)]
    specs = dict(zip(parts, model_specs(model, dict(mesh.shape), rules), strict=True))
    layers = len(model.layers)
    return lambda path, shape: NamedSharding(leaf_mesh(path, layers, mesh, rules), specs[path, shape.shape])


def cache_shardings(cache: Cache, mesh: Mesh | AbstractMesh, rules: Rules) -> Cache:
    """Return the cache's tree with a NamedSharding for each leaf; shapes are enough.

    Every array is divided as its cache's rows are: the first axis is theirs, or that of a pool of pages, which is as
    many pools, end to end, as rows are divided into. Of layers in stages those of each stage follow one another.
    """
    (batch,), sizes = cache.length.shape, dict(mesh.shape)

    def lie(node: Any) -> Any:
        leaves, structure = jax.tree.flatten(node)
        specs = [
            rules.spec(names, (batch, *leaf.shape[1:]), sizes)
            for names, leaf in zip(cache_names(node), leaves, strict=True)
        ]
        specs = [staged(spec) for spec in specs] if isinstance(node, StagedLayer) else specs
        return jax.tree.unflatten(structure, [NamedSharding(mesh, spec) for spec in specs])

    return replace(cache, length=lie(cache.length), layers=[lie(layer) for layer in cache.layers])


def shard_bytes(tree: Any, shardings: Any) -> int:
    """Return the bytes that a device holds of a tree that lies so."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in leaves)


def _parts(leaf: Any) -> list[tuple[Any, tuple[int, ...]]]:
    """Return the arrays of a leaf, and for each the sizes that must be divided.

    Nibbles are packed by runs, and a run stays whole: it counts as one.
    """
    if not (isinstance(leaf, Packed) and leaf.qtype in FOUR_BIT):
        return [(part, part.shape) for part in jax.tree.leaves(leaf)]
    last = leaf.values.shape[-1]
    runs = last // (RUN // 2) if 2 * last % RUN == 0 else 1
    packed = (leaf.values, (*leaf.values.shape[:-1], runs))
    return [packed, *((part, part.shape) for part in (leaf.scale, leaf.offset) if part is not None)]
