"""The program that a plan is of, as shapes that lie on a mesh; and the cuts of it that are compiled."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from jaxinfer import passes
from jaxinfer.cache.base import Cache
from jaxinfer.decode.loop import slots_for
from jaxinfer.errors import InputError, nearest
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import abstract
from jaxinfer.ops.placement import Rules
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.program import Program
from jaxinfer.sharding.cache import empty_cache
from jaxinfer.sharding.fitting import fit
from jaxinfer.sharding.model import OnMesh, check_stages
from jaxinfer.sharding.rules import DEFAULT, RULES
from jaxinfer.sharding.shard import put
from jaxinfer.sharding.specs import cache_shardings, model_shardings
from jaxinfer.sharding.stages import stages_on
from jaxinfer.tree import replace

CHUNK = 1024  # prompt tokens of a dispatch, as generation takes them


@dataclasses.dataclass(frozen=True)
class Built:
    """A model in the form that a mesh divides, and where its leaves lie; leaves are shapes.

    Of a mesh with stages it is one stage's: the layers of the first one, which has as many of each kind as any other.
    On devices each of them is that of all stages, as it runs there.
    """

    model: Any
    shardings: Any
    mesh: Mesh | AbstractMesh
    rules: Rules

    @property
    def sizes(self) -> dict[str, int]:
        """The mesh's axes."""
        return dict(self.mesh.shape)

    @property
    def stages(self) -> int:
        """Over how many stages the mesh divides the layers."""
        return stages_on(self.sizes, self.rules)

    def cache(self, rows: int, context: int) -> tuple[Cache, Any]:
        """Return an empty cache of `rows` rows for `context` tokens, and its shardings."""
        create = self.model.init_cache
        if not isinstance(self.model, OnMesh):  # which divides its own
            create = functools.partial(empty_cache, create, mesh=self.sizes, rules=self.rules)
        cache = jax.eval_shape(lambda: create(rows, slots_for(context)))
        return cache, cache_shardings(cache, self.mesh, self.rules)

    def ways(self, name: str, size: int) -> int:
        """Return over how many devices an axis of this name and size is divided."""
        spec = self.rules.spec((name,), (size,), self.sizes)
        axes = (spec[0] if isinstance(spec[0], tuple) else (spec[0],)) if len(spec) else ()
        return math.prod(self.sizes[a] for a in axes if a)

    def tokens(self, tokens: int) -> int:
        """Return how many of a row's new tokens a device works on."""
        return tokens // math.prod(self.sizes[a] for a in self.rules.token_axes(tokens, self.sizes))

    def cut(self, layers: Sequence[int]) -> "Built":
        """Return the model with only these of its layers."""
        take = lambda tree: replace(tree, layers=[tree.layers[i] for i in layers])  # noqa: E731
        return dataclasses.replace(self, model=take(self.model), shardings=take(self.shardings))


def build(
    config: ModelConfig, dtype: str, specs: Sequence[Any], mesh: Mesh | AbstractMesh, rules: str = DEFAULT
) -> Built:
    """Return the program of a configuration under passes on a mesh, without weights.

    Raises:
        InputError: unknown rules, a pass that refuses, or a size or layers that the mesh does not divide.
    """
    if rules not in RULES:
        raise InputError(f"rules {rules!r}: {nearest(rules, RULES)}")
    model = _without_mesh(config, dtype, json.dumps(list(specs)), fused=mesh.size == 1)
    if isinstance(mesh, Mesh):  # then it is the program that runs there, which divides kernels by itself
        model = put(model, mesh, RULES[rules])
        return Built(model, jax.tree.map(lambda leaf: leaf.sharding, model), mesh, RULES[rules])
    check_stages(model, mesh.shape, RULES[rules])
    model = fit(model, mesh, RULES[rules])
    built = Built(model, model_shardings(model, mesh, RULES[rules]), mesh, RULES[rules])
    return built.cut(range(len(model.layers) // built.stages))


@functools.lru_cache(maxsize=4)  # passes over many layers take seconds, and a sweep asks for many meshes
def _without_mesh(config: ModelConfig, dtype: str, specs: str, fused: bool) -> Any:
    """Return the model under passes; `fused` as it is loaded for one device, where nothing is divided by heads."""
    given = [spec if isinstance(spec, str) else tuple(spec) for spec in json.loads(specs)]
    model, layouts = abstract(config, jnp.dtype(dtype)), ("fused",) if fused else ()
    return passes.apply(Program(apply_layouts(model, layouts), layouts=layouts), *given).model


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh of no devices."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def layer_kinds(model: Any) -> dict[int, int]:
    """Return, by the first layer of each kind, how many layers are of that kind: of one structure and shapes."""
    first: dict[Any, int] = {}
    counts: dict[int, int] = {}
    for i, layer in enumerate(model.layers):
        leaves, structure = jax.tree.flatten(layer)
        kind = (structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
        at = first.setdefault(kind, i)
        counts[at] = counts.get(at, 0) + 1
    return counts


def cuts(model: Any) -> list[tuple[tuple[int, ...], int]]:
    """Return cuts of a model's layers, each with a weight: their weighted sum has as many layers of each kind as it.

    One has a layer of each kind, and for each kind that has more, one has a second of it. What a second layer adds,
    every further one adds too; the embedding and the head are in all.
    """
    kinds = layer_kinds(model)
    base = tuple(kinds)
    found = [(base, 1)]
    for at, count in kinds.items():
        if count > 1:
            place = base.index(at)
            found.append(((*base[:place], at, *base[place:]), count - 1))
            found[0] = (base, found[0][1] - (count - 1))
    return found
