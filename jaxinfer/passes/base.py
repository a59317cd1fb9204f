"""What a pass is: a frozen dataclass of options, what it declares about itself, and how it is applied."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax

from jaxinfer.errors import InputError
from jaxinfer.program import Program

# A resource that only one pass may take; the message of the second one.
TAKEN = {
    "kernels": "the kernels are quantized already: choose one of the two, or give each its own layers with where=",
    "cache": "each layer has one cache: choose one of the two, or give each its own layers with where=",
}
# A resource that must still be free; why a pass can't follow one that took it.
FREE = {"kernels": "it changes float kernels, and these are quantized already: put it first"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a pass declares, as data: `jaxinfer passes` prints it and the laws are checked against it."""

    family: str
    paper: str
    lossless: bool = False  # up to float rounding
    degenerate: Mapping[str, object] | None = None  # the options at which it is exactly the baseline; None: no such
    bound: float = 0.0  # relative rise of perplexity that it stays below, at its defaults, on a small trained model
    forms: Mapping[str, float] = dataclasses.field(default_factory=dict)  # other "option=value" -> the bound with it
    changes: str = "weight_bytes"  # what differs: weight_bytes, cache_bytes or flops of a step, or fork_bytes of rows
    rounds_activations: bool = False  # so that runs that differ in a float's last bit may differ by a step of rounding
    takes: str | None = None  # a key of TAKEN
    needs: tuple[str, ...] = ()  # keys of FREE
    conflicts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # pass that came before -> why not after it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Technique:
    """A pass: calling it on a program returns the changed program. Its fields are its options.

    A subclass gives `name`, `about` and `transform`, which may only use JAX operations on the leaves: on a tree of
    shapes it is run under `jax.eval_shape`.
    """

    name: ClassVar[str]
    about: ClassVar[About]

    def transform(self, program: Program) -> Program:
        """Return the changed program; the one given stays as it is."""
        raise NotImplementedError

    def __call__(self, program: Program) -> Program:
        """Apply the pass and write it, with its options, into `program.passes`.

        Raises:
            InputError: a pass that was applied before forbids this one, or `where` matches nothing.
        """
        self.check(program)
        out = through_shapes(self.transform, program)
        passes = (*program.passes, (self.name, self.options()))
        return out.replace(passes=passes, built=program.built or program.config)

    def check(self, program: Program) -> None:
        """Raise InputError where a pass that was applied before, or layers that are in stages, forbid this one."""
        if getattr(program.model, "stages", 1) > 1:  # a node is of several layers
            raise InputError(f"{self.name}: the layers are in stages; use apply, which takes them out, or shard last")
        for name, options in program.passes:
            if reason := conflict(name, options, self):
                raise InputError(f"{self.name} after {name}: {reason}")

    def options(self) -> dict[str, Any]:
        """Return the options by name."""
        return {f.name: getattr(self, f.name) for f in option_fields(type(self))}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Technique):
    """A pass that looks at the activations of a text, one layer after another.

    `wants` names the statistics of `passes.calibration.STATISTICS` that `visit` is given for each linear map.
    """

    wants: ClassVar[tuple[str, ...]]
    calibration: Any = dataclasses.field(default=None, compare=False, repr=False, metadata={"option": False})

    def visit(self, block: Any, stats: Mapping[str, Mapping[str, jax.Array]]) -> Any:
        """Return the changed layer; `stats[path of the linear map in the layer][statistic]`."""
        raise NotImplementedError

    def transform(self, program: Program) -> Program:
        """Visit every layer; each one's statistics come from the layers below as they have become."""
        return program.replace(model=self.sweep(program.model, self.visit))

    def sweep(self, model: Any, visit: Callable[..., Any], choose: Callable[[int], Any] | None = None) -> Any:
        """Return the model with its layers visited; see `calibration.sweep`."""
        from jaxinfer.passes import calibration

        return calibration.sweep(
            model, self.calibration, self.wants, visit, self.name, choose=choose, options=self.options()
        )

    def __call__(self, program: Program) -> Program:
        """Apply the pass. See `Technique`.

        Raises:
            InputError: there is no calibration text, and the program has weights.
        """
        if self.calibration is None and not is_abstract(program.model):
            raise InputError(
                f"{self.name}: needs text to calibrate on; give --calibrate FILE, or "
                "apply(..., calibration=Calibration.of(program, text))"
            )
        return super().__call__(program)


def option_fields(kind: type[Technique]) -> list[dataclasses.Field]:
    """Return the fields of a pass that are options."""
    return [f for f in dataclasses.fields(kind) if f.metadata.get("option", True)]


def conflict(before: str, options: Mapping[str, object], after: Technique) -> str | None:
    """Return why pass `after` may not follow the pass named `before` with these options, or None where it may."""
    from jaxinfer.passes import PASSES

    first, second = PASSES[before].about, after.about
    if before in second.conflicts:
        return second.conflicts[before]
    if first.takes is None or options.get("rounding") is False:  # the latter only scaled what it would take
        return None
    if first.takes in second.needs:
        return FREE[first.takes]
    apart = options.get("where") != getattr(after, "where", None)  # overlaps are found node by node
    return TAKEN[first.takes] if first.takes == second.takes and not apart else None


def is_abstract(tree: Any) -> bool:
    """Return whether a tree's leaves have no values: shapes, or the tracers of a transformation."""
    return any(isinstance(leaf, (jax.ShapeDtypeStruct, jax.core.Tracer)) for leaf in jax.tree.leaves(tree))


def through_shapes(transform: Callable[[Program], Program], program: Program) -> Program:
    """Return `transform(program)`; where the model is a tree of shapes, by evaluating it for shapes only."""
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(program.model)):
        return transform(program)
    found = []

    def run(model):
        found.append(transform(program.replace(model=model)))
        return found[-1].model

    model = jax.eval_shape(run, program.model)
    return found[-1].replace(model=model)
