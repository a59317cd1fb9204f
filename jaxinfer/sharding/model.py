"""A model on a mesh: the one given, traced for its mesh, with a cache that is divided from the start."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float

from jaxinfer.cache.base import Cache
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.placement import Rules, placed
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.sharding.cache import DividedLayer, empty_cache, repeated
from jaxinfer.sharding.fitting import mesh_without
from jaxinfer.sharding.mesh import show_mesh
from jaxinfer.sharding.specs import cache_shardings
from jaxinfer.sharding.staged_cache import STAGE, StagedLayer
from jaxinfer.sharding.stages import run_stages, stages_on, unstack


class OnMesh:
    """What a model of any kind needs to lie on a mesh; activations follow, its caches are made where they are to be."""

    mesh: Mesh
    rules: Rules

    @property
    def stages(self) -> int:
        """How many stages the layers are divided into; of several, a node of `layers` is one of each stage."""
        return stages_on(self.mesh.shape, self.rules)

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """Return an empty cache that is divided over the mesh by rows, heads and slots; see `Transformer.init_cache`.

        Raises:
            InputError: a context is to be divided, and some layer's cache can't attend over a part of its slots.
        """
        create = functools.partial(super().init_cache, dtype=dtype)
        cache = empty_cache(create, batch, slots, self.mesh.shape, self.rules)
        over = self.rules.mesh_axes("sequence", self.mesh.shape)
        whole = {type(layer).__name__ for layer in cache.layers if not hasattr(layer, "attend_part")}
        if over and whole:
            raise InputError(
                f"mesh {show_mesh(self.mesh.shape)}: {whole.pop()} is not divided by {over[0]}; leave it out"
            )
        fields = dict(mesh=self.mesh.abstract_mesh, rules=self.rules, batch=batch)
        layers = [DividedLayer(layer, **fields) for layer in cache.layers]
        if self.stages > 1:
            layers = [StagedLayer(repeated(layer, self.stages), mesh=self.mesh.abstract_mesh) for layer in layers]
        return self._constrain(Cache(cache.length, layers))

    def __call__(self, tokens: Array, cache: Cache, *args: Any, **options: Any) -> tuple[Array, Cache]:
        """Return what the model returns, traced for the mesh; see `Transformer.__call__`."""
        with placed(self.mesh, self.rules):
            hidden, cache = super().__call__(tokens, cache, *args, **options)
        return self._put_tokens(hidden), self._constrain(cache)

    def run_layers(self, x: Array, cache: Cache, *args: Any, **options: Any) -> tuple[Array, Cache, list[Array]]:
        """Return what the model returns, traced for the mesh; see `Transformer.run_layers`.

        Raises:
            InputError: layers are divided into stages, and some of them are asked for.
        """
        if self.stages > 1:
            return self._run_stages(x, cache, *args, **options)
        with placed(self.mesh, self.rules):
            if self.rules.token_axes(x.shape[1], self.mesh.shape):
                x = self._put_tokens(x)
            x, cache, found = super().run_layers(x, cache, *args, **options)
        return self._put_tokens(x), self._constrain(cache), found

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return next-token scores in float32; the vocabulary is divided as the table is."""
        with placed(self.mesh, self.rules):
            return super().logits(hidden)

    def _run_stages(
        self, x: Array, cache: Cache, counts: Array, tree: TokenTree | None = None, **some: Any
    ) -> tuple[Array, Cache, list[Array]]:
        if some.get("first") or some.get("end") is not None or some.get("after"):
            raise InputError(
                f"mesh {show_mesh(self.mesh.shape)}: stage={self.stages} runs all layers, and a drafter or pass asks "
                "for the output of some: take a drafter that does not, or leave stage out"
            )
        with placed(self.mesh, self.rules):
            x, cache = run_stages(self.layers, x, cache, counts, tree, self.mesh.abstract_mesh, self.rules)
        return self._put_tokens(x), self._constrain(cache), []

    def _constrain(self, cache: Cache) -> Cache:
        return jax.lax.with_sharding_constraint(cache, cache_shardings(cache, self.mesh, self.rules))

    def _put_tokens(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return hidden states where the work on them is to be done."""
        B, T, _ = x.shape
        axes = self.rules.row_axes(B, self.mesh.shape), self.rules.token_axes(T, self.mesh.shape)
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*axes)))


@functools.cache
def on_mesh(kind: type) -> type:
    """Return the kind of model that a Transformer, or a subclass of it as a pass makes one, is on a mesh."""
    if issubclass(kind, OnMesh):
        return kind
    fields = {"mesh": nnx.static(kw_only=True), "rules": nnx.static(kw_only=True)}
    about = {
        "__module__": __name__,
        "__doc__": f"{kind.__name__} on a mesh.",
        "__annotations__": {"mesh": Mesh, "rules": Rules},
    }
    return nnx.dataclass(type(f"Sharded{kind.__name__}", (OnMesh, kind), {**fields, **about}))


def off_stages(model: Transformer) -> Transformer:
    """Return a model in stages as the one that it was before it was on the mesh, each layer on its stage's devices.

    Any other model is given back.
    """
    if not isinstance(model, OnMesh) or model.stages == 1:
        return model
    kind = type(model).__bases__[1]
    fields = {name: getattr(model, name) for name in kind.__dataclass_fields__}
    return kind(**{**fields, "layers": unstack(model.layers, model.mesh)})


def check_stages(model: Transformer, sizes: Mapping[str, int], rules: Rules) -> None:
    """Raise InputError where a mesh divides layers in order and the model decides by itself which of them run."""
    kind, stages = type(model).__bases__[1] if isinstance(model, OnMesh) else type(model), stages_on(sizes, rules)
    if stages > 1 and kind.run_layers is not Transformer.run_layers:
        fitting = mesh_without((STAGE,), model, sizes, rules)
        raise InputError(
            f"mesh {show_mesh(sizes)}: {kind.__name__} decides which layers run, and stage={stages} divides them in "
            "order: leave one of the two out" + (f"; without stage {show_mesh(fitting)} fits" if fitting else "")
        )
