"""Layers divided over devices in order: each stage holds some that follow one another, and hidden states travel.

Stage s of p holds layers s n .. s n + n - 1. Layers j, j + n, j + 2 n, ... have one place in every stage and become one
node, whose leaves are theirs end to end, cut where they meet: what a device has is an array of its own layer.
(GPipe, 1811.06965; cut along tokens rather than rows, as TeraPipe does, 2102.07988.)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Cache
from jaxinfer.models.transformer import run_block
from jaxinfer.ops.placement import Rules, first_entry
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.sharding.staged_cache import STAGE, StagedLayer, staged

ENOUGH = 256  # tokens of a piece on a device: with fewer, products take as long as their weights take to read
MOST = 4  # pieces for each stage: of 4 p + p - 1 turns a stage then rests in p - 1, a fifth at most


def stages_on(mesh: Mapping[str, int], rules: Rules) -> int:
    """Return over how many stages rules divide the layers on a mesh of these sizes."""
    return mesh[STAGE] if rules.mesh_axes("layers", mesh) else 1


def layer_kinds(model: Any) -> list[Any]:
    """Return what must agree of layers that are to be one node: structure, what is static in it, shapes and dtypes."""
    kinds = []
    for layer in model.layers:
        leaves, structure = jax.tree.flatten(layer)
        kinds.append((structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)))
    return kinds


def unlike(kinds: Sequence[Any], stages: int) -> tuple[int, int] | None:
    """Return two layers that have one place in two of so many stages, and are not of one kind; None: all are."""
    n = len(kinds) // stages
    return next(((i % n, i) for i in range(n, len(kinds)) if kinds[i] != kinds[i % n]), None)


def leaf_mesh(path: str, layers: int, mesh: Mesh, rules: Rules) -> Mesh:
    """Return the part of the mesh that is to hold a leaf of a model of so many layers: of a layer's its stage."""
    stages, parts = stages_on(mesh.shape, rules), path.split(".")
    if stages == 1 or parts[0] != "layers":
        return mesh
    return stage_mesh(mesh, int(parts[1]) // (layers // stages))


@functools.cache
def stage_mesh(mesh: Mesh, stage: int) -> Mesh:
    """Return the devices of one stage, as a mesh of the same axes."""
    devices = mesh.devices.take([stage], axis=mesh.axis_names.index(STAGE))
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def stack(
    layers: Sequence[Any], specs: Sequence[PartitionSpec], mesh: Mesh, put: Callable[[Any, Any], Any]
) -> list[Any]:
    """Return layers as n nodes for the stages of a mesh, each stage's part on its devices.

    `specs` say how a layer's leaves lie within a stage, in the order of `jax.tree.leaves(layers)`; `put` takes an array
    there. What lies with its stage already is neither sent nor copied.
    """
    stages = mesh.shape[STAGE]
    n, found, specs = len(layers) // stages, [], list(specs)
    for place in range(n):
        leaves = zip(*(jax.tree.leaves(layer) for layer in layers[place::n]), strict=True)
        structure = jax.tree.structure(layers[place])
        own, specs = specs[: structure.num_leaves], specs[structure.num_leaves :]
        stacked = [_stack_leaf(each, spec, mesh, put) for each, spec in zip(leaves, own, strict=True)]
        found.append(jax.tree.unflatten(structure, stacked))
    return found


def unstack(layers: Sequence[Any], mesh: Mesh) -> list[Any]:
    """Return the layers of all stages in order, each on the devices of its stage."""
    return [jax.tree.map(lambda x, s=s: _stage_leaf(x, s, mesh), j) for s in range(mesh.shape[STAGE]) for j in layers]


def within(spec: PartitionSpec) -> PartitionSpec:
    """Return how a stage's part lies of an array that lies by `spec`, in which stages come first."""
    return PartitionSpec(first_entry(spec)[1:] or None, *spec[1:])


def run_stages(
    layers: Sequence[nnx.Module],
    x: Float[Array, "B T D"],
    cache: Cache,
    counts: Int[Array, "B"],
    tree: TokenTree | None,
    mesh: AbstractMesh,
    rules: Rules,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Return what the layers of all stages make of hidden states, and the cache with theirs in.

    A prompt's tokens are cut into M pieces, which follow one another from stage to stage: M + p - 1 turns of 1 / M of
    the tokens. Pieces are of tokens, not of rows, so that a cache stays whole and nothing of it is copied. A step of
    few tokens is not cut, since each turn reads a stage's weights again: its p turns take what one device takes for all
    layers. In a turn without a piece of its own a stage does the same work on no tokens, which changes nothing in its
    cache: the others would be waited for anyhow, and a branch that only some devices take may hold no exchange between
    all of them, as XLA makes them where it pleases.
    """
    stages, (B, T, _) = mesh.shape[STAGE], x.shape
    pieces = pieces_of(B, T, mesh.shape, rules, tree is None)
    t = T // pieces

    def run(layers: Any, caches: Any, x: Array, length: Array, counts: Array) -> tuple[Array, Any]:
        stage = jax.lax.axis_index(STAGE)
        offset = jnp.arange(t, dtype=jnp.int32)[None]
        depth = offset if tree is None else tree.depth
        lies = PartitionSpec(rules.row_axes(B, mesh.shape), rules.token_axes(t, mesh.shape))

        def turn(i: Array, carry: tuple) -> tuple:
            come, caches, out = carry
            piece = i - stage
            at = jnp.clip(piece, 0, pieces - 1) * t
            y = jnp.where(stage == 0, jax.lax.dynamic_slice_in_dim(x, at, t, axis=1), come)
            y = jax.lax.with_sharding_constraint(y, lies) if any(lies) else y
            real = jnp.where((piece >= 0) & (piece < pieces), jnp.clip(counts - at, 0, t), 0)
            start = length + jnp.clip(piece * t, 0, counts)
            positions = jnp.where(offset < real[:, None], start[:, None] + depth, -1)
            caches = list(caches)
            for j, layer in enumerate(layers):
                y, caches[j] = run_block(layer, y, positions, caches[j], start, real, tree)
            # Of the last stage, whose `out` is taken: what was there before its first piece is written over.
            out = jax.lax.dynamic_update_slice_in_dim(out, y, at, axis=1)
            return jax.lax.ppermute(y, STAGE, [(s, s + 1) for s in range(stages - 1)]), caches, out

        carry = jnp.zeros_like(x[:, :t]), caches, jnp.zeros_like(x)
        _, caches, out = jax.lax.fori_loop(0, pieces + stages - 1, turn, carry)
        return out[None], caches

    divided, whole = PartitionSpec(STAGE), PartitionSpec()
    out, caches = jax.shard_map(
        run,
        in_specs=(divided, divided, whole, whole, whole),
        out_specs=(divided, divided),
        axis_names={STAGE},
        check_vma=False,
    )(list(layers), [layer.inner for layer in cache.layers], x, cache.length, counts)
    return out[-1], Cache(length=cache.length, layers=[StagedLayer(inner, mesh=mesh) for inner in caches])


def pieces_of(rows: int, tokens: int, mesh: Mapping[str, int], rules: Rules, chain: bool) -> int:
    """Return into how many pieces a step's tokens are cut: a power of two, 1 for few tokens and for a tree of them.

    As many as leave each piece `ENOUGH` tokens of all rows on a device, up to `MOST` for each stage. Tokens that a
    context divides stay divided.
    """
    ways = np.prod([mesh[a] for a in rules.row_axes(rows, mesh)], initial=1)
    pieces = 1
    while (
        chain
        and 2 * pieces <= MOST * stages_on(mesh, rules)
        and tokens % (2 * pieces) == 0
        and rows // ways * (tokens // (2 * pieces)) >= ENOUGH
        and rules.token_axes(tokens // (2 * pieces), mesh) == rules.token_axes(tokens, mesh)
    ):
        pieces *= 2
    return pieces


def _stack_leaf(leaves: Sequence[Any], spec: PartitionSpec, mesh: Mesh, put: Callable[[Any, Any], Any]) -> Any:
    """Return the arrays of all stages as one, end to end along their first axis."""
    first, *others = leaves[0].shape
    shape, sharding = (len(leaves) * first, *others), NamedSharding(mesh, staged(spec))
    if isinstance(leaves[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaves[0].dtype, sharding=sharding)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return put(jnp.concatenate(leaves), sharding)
    placed = [put(leaf, NamedSharding(stage_mesh(mesh, s), spec)) for s, leaf in enumerate(leaves)]
    parts = [shard.data for leaf in placed for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=leaves[0].dtype)


def _stage_leaf(leaf: Any, stage: int, mesh: Mesh) -> Any:
    """Return a stage's part of an array, where it lies."""
    if isinstance(leaf, jax.core.Tracer):
        return jnp.split(leaf, mesh.shape[STAGE])[stage]
    size, part = leaf.shape[0] // mesh.shape[STAGE], stage_mesh(mesh, stage)
    shape, sharding = (size, *leaf.shape[1:]), NamedSharding(part, within(leaf.sharding.spec))
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
    parts = [shard.data for shard in leaf.addressable_shards if (shard.index[0].start or 0) // size == stage]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts, dtype=leaf.dtype)
