"""Running a GPU kernel in Pallas's interpreter on a CPU, with what that does not know put in plain jax."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_attention import gpu_body


class Transposed:
    """A matrix in shared memory with its axes swapped."""

    def __init__(self, ref: Any):
        self._ref, self.shape = ref, ref.shape[::-1]

    def __getitem__(self, at: Any) -> Any:
        return self._ref[...].T

    def __setitem__(self, at: Any, value: Any) -> None:
        self._ref[...] = value.T


def _multiply(acc: Any, a: Any, b: Any) -> Any:
    found = jax.lax.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32))
    return found if acc is None else acc + found


def _zeros_past_the_end(held: np.ndarray | None, shape: tuple[int, ...], _: Any, dtype: Any, *__: Any) -> np.ndarray:
    found = np.zeros(shape, dtype)
    if held is not None:
        found[tuple(map(slice, held.shape))] = held
    return found


@contextlib.contextmanager
def interpreter() -> Iterator[Any]:
    """Yield what a kernel is given as `interpret`."""
    with contextlib.ExitStack() as stack:
        for of, name, by in (
            (compat, "load", lambda ref, *_, **__: ref[...]),
            (compat, "transposed", Transposed),
            (plgpu, "layout_cast", lambda x, _: x),
            (plgpu, "broadcasted_iota", lambda *args, layout: jax.lax.broadcasted_iota(*args)),
            (gpu_body, "multiply", _multiply),
            (gpu_callbacks, "_handle_out_of_bounds_read", _zeros_past_the_end),
        ):
            stack.enter_context(mock.patch.object(of, name, by))
        yield InterpretGPUParams()
