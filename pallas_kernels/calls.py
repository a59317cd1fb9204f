"""The one way a TPU kernel is called: its scalars, its VMEM checked before the compiler sees it, its interpreter."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import chips, compat

Known = jax.Array | np.ndarray  # scalars and masks; what is given as numpy arrays is written into the kernel
Interpret = Any  # False: compile; True: plain interpreter; compat.interpret_params(...): with DMAs and semaphores


def call(
    body: Callable[..., None],
    *,
    name: str,
    out_shape: Any,
    grid: tuple[int, ...],
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Any,
    scratch: Sequence[Any],
    scalars: Sequence[Any],
    semantics: tuple[str, ...],
    aliases: Mapping[int, int] | None = None,
    interpret: Interpret = False,
) -> Callable[..., Any]:
    """Return a function of the arrays that runs `body(*scalars, *inputs, *outputs, *scratch)` on every grid point.

    Scalars are int32 arrays that `body` reads from SMEM. No block index may depend on them: what depends on a scalar
    is copied by the body. Scalars that are numpy arrays are written into the kernel itself: the same kernel, of which a
    static profile then knows every loop's bound. `aliases` maps inputs to outputs, by position among the arrays.

    Raises:
        ValueError: the buffers need more VMEM than the chip gives a kernel.
    """
    chip = chips.current()
    known = all(isinstance(s, np.ndarray) for s in scalars)
    aliases = dict(aliases or {})
    count = len(scalars)
    params = compat.compiler_params(semantics, chip.vmem_limit)
    options = dict(out_shape=out_shape, compiler_params=params, name=name, interpret=interpret)
    if known:
        values = [np.asarray(s, np.int32) for s in scalars]

        def constant(*refs):
            @pl.when(functools.reduce(jnp.logical_and, [pl.program_id(i) == 0 for i in range(len(grid))]))
            def _():
                for ref, value in zip(refs[len(refs) - count :], values, strict=True):
                    for index in np.ndindex(*value.shape):
                        ref[index] = jnp.int32(int(value[index]))

            body(*refs[len(refs) - count :], *refs[: len(refs) - count])

        prefetched = []
        run = pl.pallas_call(
            constant if count else body,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[*scratch, *(compat.SMEM(v.shape, jnp.int32) for v in values)],
            input_output_aliases=aliases,
            **options,
        )
    else:
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=count,
            grid=grid,
            in_specs=_without_scalars(in_specs, len(grid)),
            out_specs=_without_scalars(out_specs, len(grid)),
            scratch_shapes=list(scratch),
        )
        aliases = {i + count: o for i, o in aliases.items()}
        run = pl.pallas_call(body, grid_spec=spec, input_output_aliases=aliases, **options)
        prefetched = [jnp.asarray(s, jnp.int32) for s in scalars]

    def checked(*arrays):
        check_vmem(name, in_specs, arrays, out_specs, out_shape, scratch, chip)
        return run(*prefetched, *arrays)

    return checked


def _without_scalars(specs: Any, axes: int) -> Any:
    """Return block specs whose index maps are given the grid point alone, as they were written."""

    def rewrite(spec: pl.BlockSpec) -> pl.BlockSpec:
        if spec.index_map is None:
            return spec
        return dataclasses.replace(spec, index_map=lambda *at: spec.index_map(*at[:axes]))

    return jax.tree.map(rewrite, specs, is_leaf=lambda x: isinstance(x, pl.BlockSpec))


def scalar_math(fn: Callable[..., Any], *args: Any) -> Any:
    """Return `fn(*args)`; numpy arrays where all `args` are, also under a trace: what is known stays known."""
    if all(a is None or isinstance(a, (np.ndarray, int)) for a in args):
        with jax.ensure_compile_time_eval():
            return jax.tree.map(np.asarray, fn(*args))
    return fn(*args)


def check_vmem(
    name: str,
    in_specs: Sequence[Any],
    arrays: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    scratch: Sequence[Any],
    chip: chips.Chip,
) -> None:
    """Raise if the blocks and the scratch need more VMEM than a kernel is given."""
    need = vmem_bytes(in_specs, arrays, out_specs, out_shape, scratch)
    if need > chip.vmem_limit:
        raise ValueError(
            f"{name}: its blocks need {need / 2**20:.1f} MiB of VMEM, and {chip.name} gives a kernel "
            f"{chip.vmem_limit / 2**20:.0f} MiB; take smaller blocks"
        )


def vmem_bytes(
    in_specs: Sequence[Any], arrays: Sequence[Any], out_specs: Any, out_shape: Any, scratch: Sequence[Any]
) -> int:
    """Return the bytes of VMEM that the blocks of arrays, twice each for the pipeline, and the scratch need."""
    need = 0
    for spec, dtype in [
        # Two bytes an entry at least: a body widens what is smaller, and needs room for that.
        *((s, x.dtype if x.dtype.itemsize > 1 else jnp.bfloat16) for s, x in zip(in_specs, arrays, strict=True)),
        *zip(jax.tree.leaves(out_specs), (s.dtype for s in jax.tree.leaves(out_shape)), strict=True),
    ]:
        if spec.block_shape is not None and spec.memory_space != compat.SMEM:
            need += 2 * tiled_bytes([d for d in spec.block_shape if d is not None], dtype)
    for buffer in scratch:
        if getattr(buffer, "memory_space", None) == compat.VMEM:
            need += tiled_bytes(buffer.shape, buffer.dtype)
    return need


def tiled_bytes(shape: Sequence[int], dtype: Any) -> int:
    """Return the bytes that an array takes in VMEM: the last two axes are padded to tiles of 8 x 128 words."""
    size = jnp.dtype(dtype).itemsize
    *rest, rows, lanes = (1, 1, *shape)
    return math.prod(rest) * round_up(rows, 32 // size) * round_up(lanes, 128) * size


def round_up(n: int, to: int) -> int:
    """Return the smallest multiple of `to` that is at least `n`."""
    return -(-n // to) * to


def div(a: Any, b: int) -> Any:
    """Return `a // b` of numbers that are not negative, without the sign's cases."""
    return jax.lax.div(a, jnp.full_like(a, b))


def rem(a: Any, b: int) -> Any:
    """Return `a % b` of numbers that are not negative, without the sign's cases."""
    return jax.lax.rem(a, jnp.full_like(a, b))
