"""Others' kernels, made fit for a static profile: their scalars become constants, as ours do."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import compat


@contextlib.contextmanager
def known_scalars(values: Sequence[np.ndarray]) -> Iterator[None]:
    """Make the next kernel that is called with prefetched scalars take `values` for them, written into it.

    For kernels whose block index maps do not look at the scalars; for those that do see `known_blocks`.
    """
    real = pl.pallas_call

    def pallas_call(kernel: Any, out_shape: Any = None, *, grid_spec: Any, **options: Any) -> Any:
        count = grid_spec.num_scalar_prefetch
        known = [np.asarray(value, np.int32) for value in values]
        if len(known) != count:
            raise ValueError(f"{len(known)} scalars: the kernel prefetches {count}")

        def body(*refs: Any) -> Any:
            scalars = refs[len(refs) - count :]
            first = [pl.program_id(i) == 0 for i in range(len(grid_spec.grid))]

            @pl.when(functools.reduce(jnp.logical_and, first))
            def _() -> None:
                for ref, value in zip(scalars, known, strict=True):
                    for at, x in np.ndenumerate(value):
                        ref[at] = jnp.int32(int(x))

            return kernel(*scalars, *refs[: len(refs) - count])

        scratch = [*grid_spec.scratch_shapes, *(compat.SMEM(x.shape, jnp.int32) for x in known)]
        specs = dict(in_specs=grid_spec.in_specs, out_specs=grid_spec.out_specs, grid=grid_spec.grid)
        call = real(body, out_shape, scratch_shapes=scratch, **specs, **options)
        return lambda *args: call(*args[count:])

    with mock.patch.object(pl, "pallas_call", pallas_call):
        yield


class Table:
    """Prefetched scalars as constants: `table[i, j]` is computed from the index, which a profile can follow.

    The numbers are cut into runs that stay equal or count up, and the run is selected by where it begins.
    """

    def __init__(self, values: np.ndarray):
        self.shape = values.shape
        found = [int(x) for x in values.ravel()]
        self._runs: list[tuple[int, int, int]] = []  # where it begins; the numbers are slope * index + shift
        at = 0
        while at < len(found):
            slope = found[at + 1] - found[at] if at + 1 < len(found) else 0
            slope = slope if slope in (0, 1) else 0
            end = at + 1
            while end < len(found) and found[end] - found[end - 1] == slope:
                end += 1
            self._runs.append((at, slope, found[at] - slope * at))
            at = end

    def __getitem__(self, at: Any) -> Any:
        at = at if isinstance(at, tuple) else (at,)
        index = jnp.int32(0)
        for size, i in zip(self.shape, at, strict=True):
            index = index * size + i
        slope, shift = (jnp.int32(x) for x in self._runs[0][1:])
        for start, *run in self._runs[1:]:
            slope, shift = (jnp.where(index >= start, x, y) for x, y in zip(run, (slope, shift), strict=True))
        return slope * index + shift


@contextlib.contextmanager
def known_blocks(vmem_limit: int) -> Iterator[None]:
    """Write the scalars that kernels prefetch, which must be known here, into the kernels and their index maps."""
    real = pl.pallas_call

    def pallas_call(kernel: Any, out_shape: Any = None, *, grid_spec: Any, **options: Any) -> Any:
        count = grid_spec.num_scalar_prefetch
        params = dataclasses.replace(options["compiler_params"], vmem_limit_bytes=vmem_limit)
        options = {**options, "compiler_params": params, "cost_estimate": None, "metadata": None}

        def call(*args: Any) -> Any:
            tables = [None if x is None else Table(np.asarray(x)) for x in args[:count]]

            def bind(spec: pl.BlockSpec | None) -> pl.BlockSpec | None:
                if spec is None or spec.index_map is None:
                    return spec
                index_map = spec.index_map
                return dataclasses.replace(spec, index_map=lambda *at: index_map(*at, *tables))

            def whole(specs: Any) -> Any:
                return jax.tree.map(bind, specs, is_leaf=lambda x: x is None or isinstance(x, pl.BlockSpec))

            return real(
                lambda *refs: kernel(*tables, *refs),
                out_shape,
                grid=tuple(int(n) for n in grid_spec.grid),
                in_specs=whole(grid_spec.in_specs),
                out_specs=whole(grid_spec.out_specs),
                scratch_shapes=grid_spec.scratch_shapes,
                **options,
            )(*args[count:])

        return call

    with mock.patch.object(pl, "pallas_call", pallas_call):
        yield
