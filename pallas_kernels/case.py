"""A case: one call of a kernel, small enough to test or large enough to time; and a kernel as the scripts see it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WIDE = ("scale", "grid", "offset", "cos", "sin")  # words in the names of what is float32 beside bfloat16 too


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of one call, as shapes to draw from; the kernel's scalars (lengths, tables) as numpy int32 arrays.

    `flops` and `bytes` are what the result needs at least: products (multiply and add are two) and HBM traffic.
    `spoil` puts NaN wherever the kernel must not look.
    """

    name: str
    shapes: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    int8: bool = False  # the products are of integers, of which some chips make twice as many
    races: bool = False  # is tested for races too: small, and of a kind of its own
    donated: tuple[str, ...] = ()  # names of what the call changes in place
    rounded: bool = False  # what is written there was rounded on the way: it is near the reference's, the rest the same
    blocks: Mapping[str, int] | None = None  # of a test; what is timed takes the tuned ones
    gpu_blocks: Mapping[str, int] | None = None  # the same for a GPU
    spoil: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def narrowed(self) -> "Case":
        """Return the case with bfloat16 where it has float32 numbers: a GPU's matrix units take no wider ones."""
        return dataclasses.replace(self, shapes=_narrowed(self.shapes))

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """Return arrays: normal numbers, whole-range integers, and small positive numbers for scales and grids."""
        rng = np.random.default_rng(seed)
        return _inputs(rng, self.shapes)


def _narrowed(shapes: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, Mapping):
            found[name] = _narrowed(shape)
        elif shape.dtype != jnp.float32 or any(word in name for word in _WIDE):
            found[name] = shape
        elif isinstance(shape, np.ndarray):
            found[name] = shape.astype(jnp.bfloat16)
        else:
            found[name] = jax.ShapeDtypeStruct(shape.shape, jnp.bfloat16)
    return found


def _inputs(rng: np.random.Generator, shapes: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, shape in shapes.items():
        if isinstance(shape, Mapping):
            found[name] = _inputs(rng, shape)
        else:
            found[name] = shape if isinstance(shape, np.ndarray) else _draw(rng, name, shape)
    return found


def _draw(rng: np.random.Generator, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jnp.bool_):
        return jnp.asarray(rng.integers(0, 2, shape.shape), bool)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        bounds = jnp.iinfo(shape.dtype)
        return jnp.asarray(rng.integers(max(bounds.min, -127), bounds.max, shape.shape, endpoint=True), shape.dtype)
    if "scale" in name or "grid" in name:
        return jnp.asarray(rng.uniform(0.004, 0.02, shape.shape), shape.dtype)
    return jnp.asarray(rng.standard_normal(shape.shape), shape.dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel and what belongs to it."""

    name: str
    tpu: Callable[..., Any] | None  # (**inputs, **options, blocks=None, interpret=False)
    reference: Callable[..., Any]  # (**inputs, **options), in float32
    tests: Sequence[Case]  # small: checked by the interpreters and compiled for every chip
    timed: Sequence[Case]  # of real sizes: profiled and timed
    candidates: Callable[[Case, str], Sequence[dict[str, int]]] | None  # blocks worth trying for a case on a chip
    shape_class: Callable[..., dict[str, int | str]] | None  # (**inputs, **options): the key of the tuned table
    peers: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)  # others' kernels, same arguments
    peer_bytes: Mapping[str, Callable[[Case], float]] = dataclasses.field(default_factory=dict)  # where they read more
    gpu: Callable[..., Any] | None = None  # as `tpu`, for a Hopper GPU
    gpu_candidates: Callable[[Case], Sequence[dict[str, int]]] | None = None  # blocks worth trying there
    gpu_peers: Mapping[str, Callable[..., Any]] = dataclasses.field(default_factory=dict)  # as `peers`; of one that has
    # `prepare`, that makes what its `run` takes, and `run` alone is timed
    gpu_class: Callable[..., dict[str, int | str]] | None = None  # as `shape_class`, of the table of a GPU's blocks
    gpu_timed: Sequence[Case] = ()  # timed on a GPU; by default what is timed anyway
    gpu_tests: Sequence[Case] = ()  # checked on a GPU beside `tests`


@dataclasses.dataclass(frozen=True)
class Peer:
    """A kernel: `run(*prepare(...))` on our arguments, of which `run` alone is to be timed.

    Raises:
        NotImplementedError: a case that is not for it.
    """

    prepare: Callable[..., tuple[Any, ...]]
    run: Callable[..., Any]

    def __call__(self, **inputs: Any) -> Any:
        return self.run(*self.prepare(**inputs))
