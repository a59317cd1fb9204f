"""Others' kernels, made fit for a static profile: their scalars become constants, as ours do."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import compat


@contextlib.contextmanager
def known_scalars(values: Sequence[np.ndarray]) -> Iterator[None]:
    """Make the next kernel that is called with prefetched scalars take `values` for them, written into it.

    For kernels whose block index maps do not look at the scalars; those that do stay unknown to the profile.
    """
    real = pl.pallas_call

    def pallas_call(kernel: Any, out_shape: Any = None, *, grid_spec: Any, **options: Any) -> Any:
        count = grid_spec.num_scalar_prefetch
        flat = [np.asarray(value, np.int32).ravel() for value in values]
        if len(flat) != count:
            raise ValueError(f"{len(flat)} scalars: the kernel prefetches {count}")

        def body(*refs: Any) -> Any:
            scalars = refs[len(refs) - count :]
            first = [pl.program_id(i) == 0 for i in range(len(grid_spec.grid))]

            @pl.when(functools.reduce(jnp.logical_and, first))
            def _() -> None:
                for ref, value in zip(scalars, flat, strict=True):
                    for i, x in enumerate(value):
                        ref[i] = jnp.int32(int(x))

            return kernel(*scalars, *refs[: len(refs) - count])

        scratch = [*grid_spec.scratch_shapes, *(compat.SMEM(x.shape, jnp.int32) for x in flat)]
        specs = dict(in_specs=grid_spec.in_specs, out_specs=grid_spec.out_specs, grid=grid_spec.grid)
        call = real(body, out_shape, scratch_shapes=scratch, **specs, **options)
        return lambda *args: call(*args[count:])

    with mock.patch.object(pl, "pallas_call", pallas_call):
        yield
