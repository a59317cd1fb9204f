"""The pass that puts a program on a mesh: what it computes stays, and `generate`, `Session` and the rest run it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxinfer.errors import InputError, nearest
from jaxinfer.models.moe import MoE
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.placement import Rules, send
from jaxinfer.program import Program
from jaxinfer.sharding.experts import DividedMoE
from jaxinfer.sharding.fitting import fit
from jaxinfer.sharding.mesh import make_mesh, parse_mesh
from jaxinfer.sharding.model import OnMesh, check_stages, off_stages, on_mesh
from jaxinfer.sharding.rules import DEFAULT, RULES
from jaxinfer.sharding.specs import model_shardings, model_specs
from jaxinfer.sharding.stages import leaf_mesh, stack
from jaxinfer.tree import path_of, replace, rewrite, select


@dataclasses.dataclass(frozen=True)
class Shard:
    """The pass that `shard` returns."""

    mesh: Mesh
    rules: Rules

    def __call__(self, program: Program) -> Program:
        """Return the program on the mesh.

        Raises:
            InputError: a size that the mesh does not divide, with a mesh that fits.
        """
        decoder = program.decoder
        if select(decoder, Transformer):
            decoder = rewrite(decoder, Transformer, ".*", lambda model: _put_draft(model, self.mesh, self.rules))
        return program.replace(model=put(program.model, self.mesh, self.rules), decoder=decoder)

    def shapes(self, model: Any) -> Any:
        """Return a tree of shapes with the sharding of each leaf, as it is: what the mesh does not divide is whole."""
        specs, layers = iter(model_specs(model, dict(self.mesh.shape), self.rules)), len(model.layers)

        def place(keys: tuple, leaf: Any) -> Any:
            return put_leaf(leaf, NamedSharding(leaf_mesh(path_of(keys), layers, self.mesh, self.rules), next(specs)))

        return jax.tree_util.tree_map_with_path(place, model)


def shard(mesh: Mesh | str, rules: Rules | str = DEFAULT) -> Shard:
    """Return the pass that puts a program on a mesh, or on that of "data=2,model=4", by the rules of a name.

    Apply it last. The arrays of the model, and of a drafter's model, go to their devices; a tree of shapes gets the
    shardings. A drafter's model that the mesh does not divide lies whole on every device.

    Raises:
        InputError: a mesh or rules that are not there.
    """
    mesh = make_mesh(parse_mesh(mesh)) if isinstance(mesh, str) else mesh
    return Shard(mesh, find_rules(rules) if isinstance(rules, str) else rules)


def through_mesh(change: Callable[[Program], Program], program: Program, runs: bool) -> Program:
    """Return what a change makes of a program, on the mesh where it is, if any, with every array where its rules say.

    Layers in stages are changed one by one, each on its stage's devices. Where the change `runs` them, one after
    another on the same devices, every device has for that time its part of all layers, and not of its stage's alone.
    """
    model = program.model
    if not isinstance(model, OnMesh):
        return change(program)
    place = Shard(model.mesh, model.rules)
    if model.stages > 1:
        model, rules = off_stages(model), place.rules
        whole = dataclasses.replace(rules, table=tuple(entry for entry in rules.table if entry[0] != "layers"))
        program = program.replace(model=put(model, place.mesh, whole) if runs else model)
    return place(change(program))


def find_rules(name: str) -> Rules:
    """Return the rules of a name.

    Raises:
        InputError: there are none of that name.
    """
    if name not in RULES:
        raise InputError(f"no rules {name!r}: {nearest(name, RULES)}")
    return RULES[name]


def put(model: Transformer, mesh: Mesh | AbstractMesh, rules: Rules) -> Transformer:
    """Return the model on the mesh, in the form that the mesh divides; one in stages is taken out of them before."""
    model = off_stages(model)
    check_stages(model, mesh.shape, rules)
    fields = {name: getattr(model, name) for name in type(model).__dataclass_fields__}
    model = on_mesh(type(model))(**{**fields, "mesh": mesh, "rules": rules})
    model = jax.tree.map(_in_host_memory, model)
    model = fit(model, mesh, rules)
    if select(model, MoE):
        model = rewrite(model, MoE, ".*", _divide_experts)
    shardings = model_shardings(model, mesh, rules)
    if model.stages == 1:
        return jax.tree.map(put_leaf, model, shardings)
    specs = [sharding.spec for sharding in jax.tree.leaves(shardings.layers)]
    layers, rest = stack(model.layers, specs, mesh, put_leaf), replace(model, layers=[])
    return replace(jax.tree.map(put_leaf, rest, replace(shardings, layers=[])), layers=layers)


def put_leaf(leaf: Any, sharding: NamedSharding) -> Any:
    """Return an array where the sharding says, or a shape that says so too."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    if sharding.is_fully_addressable or isinstance(leaf, jax.core.Tracer):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(leaf)  # from where it lies on the devices of all processes
    return send(np.asarray(leaf), sharding)


def _in_host_memory(leaf: Any) -> Any:
    """Return the array of a CPU as numpy sees it: to cut that takes no copy and no compiled function."""
    if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or len(leaf.sharding.device_set) > 1:
        return leaf
    if not leaf.is_fully_addressable:
        return leaf  # a stage's, whose only device is another process's
    return np.asarray(leaf) if next(iter(leaf.sharding.device_set)).platform == "cpu" else leaf


def _divide_experts(node: MoE) -> DividedMoE:
    return DividedMoE(**{name: getattr(node, name) for name in MoE.__dataclass_fields__})


def _put_draft(model: Transformer, mesh: Mesh, rules: Rules) -> Transformer:
    try:
        return put(model, mesh, rules)
    except InputError:
        rows = tuple(entry for entry in rules.table if entry[0] == "batch")
        return put(model, mesh, Rules("draft", rows))
