"""What a mesh asks of a model: sizes that it divides. Key heads that are too few are repeated; the rest is refused."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxinfer.cache.dense import Dense
from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.paged import Paged
from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.cache.streaming import Streaming
from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.models.transformer import Attention
from jaxinfer.ops.placement import Rules
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV
from jaxinfer.passes.layout.separate import separate
from jaxinfer.sharding.mesh import show_mesh
from jaxinfer.sharding.names import axes_of_nodes, names_of
from jaxinfer.sharding.rules import MUST_DIVIDE
from jaxinfer.sharding.stages import layer_kinds, unlike
from jaxinfer.tree import path_of, replace, rewrite, select

_PEOPLE = {
    "heads": "query heads",
    "kv_heads": "key heads",
    "mlp": "the width of the mlp",
    "experts": "experts",
    "layers": "each stage has as many",
}

_WHOLE = {
    Kivi: "kv_int4, whose old tokens are in groups of many",
    Paged: "kv_paged, whose pages of a row are in any order",
    Streaming: "kv_window, which holds a window of slots whatever the context",
}


def fit(model: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> Any:
    """Return the model in the form that the mesh divides, with the same function; abstract trees work too.

    Fused projections are taken apart where their outputs are divided. Where the mesh has more devices than there are
    key heads, each is stored several times, so that every device has the one that its query heads read.

    Raises:
        InputError: a size that can't be divided; with a mesh that fits.
    """
    sizes = dict(mesh.shape)
    if _divides_outputs(sizes, rules):
        model = separate(model)
    times = _repeats(model, sizes, rules)
    if times > 1:
        model = rewrite(model, Attention, ".*", lambda node: _each_head(node, times, repeat=True))
    check_fits(model, mesh, rules)
    return model


def unfit(model: Any) -> Any:
    """Return the model with every key head once again, as a file is to have it."""
    heads = [node.num_kv_heads for node in select(model, Attention).values()]
    times = max(heads, default=0) // model.config.num_kv_heads
    return model if times < 2 else rewrite(model, Attention, ".*", lambda node: _each_head(node, times, repeat=False))


def check_fits(model: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> None:
    """Raise InputError where the mesh does not divide what it must, or where the model was not made to fit."""
    sizes = dict(mesh.shape)
    if _divides_outputs(sizes, rules) and select(model, (FusedQKV, FusedGateUp)):
        raise InputError("fused projections can't be divided: apply sharding.fitting.fit, or load with the mesh")
    _check_caches(model, sizes, rules)
    problem = _problem(model, sizes, rules)
    if problem is not None:
        name, size, axes = problem
        parts = show_mesh({a: sizes[a] for a in axes})
        fitting = nearest_mesh(model, sizes, rules)
        raise InputError(
            f"mesh {show_mesh(sizes)}: {name}={size} ({_PEOPLE[name]}) is not divided by {parts} (rules {rules.name}); "
            + (f"{show_mesh(fitting)} fits" if fitting else "no mesh of as many devices fits")
        )
    _check_layers(model, sizes, rules)


def _check_caches(model: Any, sizes: dict[str, int], rules: Rules) -> None:
    """Raise InputError where a context is divided and some layer's cache is of a kind that can't be."""
    axes = rules.mesh_axes("sequence", sizes)
    caches = [node.cache for node in select(model, Attention).values()]
    kinds = {Paged if getattr(cache, "page", None) else type(cache) for cache in caches} - {Dense, QuantizedCache}
    if not axes or not kinds:
        return
    kind = next((what for known, what in _WHOLE.items() if known in kinds), "this model's cache")
    fitting = mesh_without(axes, model, sizes, rules)
    raise InputError(
        f"mesh {show_mesh(sizes)}: {kind} is not divided by {show_mesh({a: sizes[a] for a in axes})}: take kv_int8 or "
        "kv_fp8, or leave it out" + (f"; without context {show_mesh(fitting)} fits" if fitting else "")
    )


def _check_layers(model: Any, sizes: dict[str, int], rules: Rules) -> None:
    """Raise InputError where layers are divided into stages that do not have layers of one kind at each place."""
    kinds = _kinds(model, sizes, rules)
    axes = rules.mesh_axes("layers", sizes)
    pair = unlike(kinds, math.prod(sizes[a] for a in axes)) if axes else None
    if pair is not None:
        fitting = nearest_mesh(model, sizes, rules)
        raise InputError(
            f"mesh {show_mesh(sizes)}: layers {pair[0]} and {pair[1]}, which have one place in two of "
            f"{show_mesh({a: sizes[a] for a in axes})}, are not of one kind (window, experts, sizes or passes); "
            + (f"{show_mesh(fitting)} fits" if fitting else "no mesh of as many devices fits")
        )


def _kinds(model: Any, sizes: Mapping[str, int], rules: Rules) -> list[Any]:
    """Return the layers' kinds where the mesh has stages."""
    return layer_kinds(model) if rules.mesh_axes("layers", sizes) else []


def mesh_without(axes: Sequence[str], model: Any, sizes: Mapping[str, int], rules: Rules) -> dict[str, int] | None:
    """Return the mesh of as many devices that the model fits, is nearest to the given one, and has none of `axes`."""
    rest = {"data": 1, **{name: size for name, size in sizes.items() if name not in axes}}
    return nearest_mesh(model, {**rest, "data": rest["data"] * math.prod(sizes[a] for a in axes)}, rules)


def nearest_mesh(model: Any, sizes: Mapping[str, int], rules: Rules) -> dict[str, int] | None:
    """Return the mesh of as many devices that the model fits and that is nearest to the given one, or None."""
    count = math.prod(sizes.values())
    names = (*sizes,) if "data" in sizes else ("data", *sizes)

    def distance(found: Mapping[str, int]) -> float:
        return sum(abs(math.log2(found[n] / sizes.get(n, 1))) for n in names)

    kinds = _kinds(model, sizes, rules)
    for found in sorted((dict(zip(names, f, strict=True)) for f in _factored(count, len(names))), key=distance):
        stages = math.prod(found[a] for a in rules.mesh_axes("layers", found))
        if _problem(model, found, rules, _repeats(model, found, rules)) is None and unlike(kinds, stages) is None:
            return {n: size for n, size in found.items() if size > 1 or n in sizes}
    return None


def _factored(count: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write a number as a product of so many."""
    if parts == 1:
        yield (count,)
        return
    for first in (d for d in range(1, count + 1) if count % d == 0):
        yield from ((first, *rest) for rest in _factored(count // first, parts - 1))


def _problem(
    model: Any, sizes: Mapping[str, int], rules: Rules, times: int = 1
) -> tuple[str, int, tuple[str, ...]] | None:
    """Return the first axis that must be divided and is not: its name, size, and the mesh axes."""
    for named in (*axes_of_nodes(model), (("layers", len(model.layers)),)):
        taken: set[str] = set()
        for name, size in named:
            axes = tuple(a for a in rules.mesh_axes(name, sizes) if a not in taken)
            taken.update(axes)
            whole = size * times if name == "kv_heads" else size
            if name in MUST_DIVIDE and whole % math.prod(sizes[a] for a in axes):
                return name, size, axes
    return None


def _divides_outputs(sizes: Mapping[str, int], rules: Rules) -> bool:
    return any(rules.mesh_axes(name, sizes) for name in ("heads", "mlp"))


def _repeats(model: Any, sizes: Mapping[str, int], rules: Rules) -> int:
    """Return how often each key head must be stored so that the mesh divides them: 1 where it does, or can't."""
    ways = math.prod(sizes[a] for a in rules.mesh_axes("kv_heads", sizes))
    heads, kv_heads = (
        {size for named in axes_of_nodes(model) for name, size in named if name == wanted}
        for wanted in ("heads", "kv_heads")
    )
    times = max((ways // math.gcd(K, ways) for K in kv_heads), default=1)
    return times if all(N % (K * times) == 0 for N in heads for K in kv_heads) else 1


def _each_head(node: Attention, times: int, repeat: bool) -> Attention:
    """Return the attention with every key and value head `times` times, side by side, or one of so many."""

    def change(linear: Any) -> Any:
        def of(keys: tuple, leaf: Any) -> Any:
            names = names_of(linear, path_of(keys), leaf.shape)
            axis = names.index("kv_heads") if "kv_heads" in names else None
            if axis is None or leaf.shape[axis] != node.num_kv_heads:
                return leaf

            def fn(x: Any) -> Any:
                if not repeat:
                    return x[(slice(None),) * axis + (slice(None, None, times),)]
                return (np if isinstance(x, np.ndarray) else jnp).repeat(x, times, axis=axis)

            return jax.eval_shape(fn, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else fn(leaf)

        return jax.tree_util.tree_map_with_path(of, linear)

    qkv = rewrite(node.qkv, Linear, ".*", lambda x: change(x) if "kv_heads" in x.axes else x)
    heads = node.num_kv_heads * times if repeat else node.num_kv_heads // times
    return replace(node, qkv=qkv, num_kv_heads=heads)
