"""A GPU kernel that changes arrays in place, in Python: a block of its grid after the other, its threads on NumPy."""

import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128


class Ref:
    """An array in memory, or a window of one."""

    def __init__(self, array: np.ndarray):
        self.array, self.at = array, _At(array)

    def __getitem__(self, index: Any) -> Any:
        return jnp.asarray(self.array[_plain(index)])


class _At:
    def __init__(self, array: np.ndarray):
        self._array = array

    def __getitem__(self, index: Any) -> Ref:
        return Ref(self._array[_plain(index)])


def _plain(index: Any) -> tuple[int, ...]:
    """Return an index inside of the array, as a kernel's must be."""
    found = tuple(int(i) for i in (index if isinstance(index, tuple) else (index,)))
    assert all(i >= 0 for i in found), found
    return found


def _given(x: Any) -> Any:
    """Return what a thread sees of an argument: memory, or a number that each of them has."""
    if isinstance(x, Ref):
        return x.array
    if isinstance(x, dict):
        return {name: _given(value) for name, value in x.items()}
    number = np.full(THREADS, int(x) & 0xFFFFFFFF, np.uint32)
    return SimpleNamespace(registers=SimpleNamespace(item=lambda: number))


def _inline(**_: Any) -> Any:
    return lambda run: lambda *args: run(None, *map(_given, args))


def run_here(monkeypatch: Any, module: Any) -> None:
    """Have the kernel of a module run here; its threads' module must be given instructions on NumPy arrays."""
    at: dict[str, Any] = {}

    def in_place(body: Any, *, name: str, out_types: list[Any], grid: tuple[int, ...], grid_names: tuple[str, ...]):
        def call(kept: list[Any], changed: list[Any]) -> tuple[list[Any], list[Any]]:
            arrays = [np.array(x) for x in (*kept, *changed)] + [np.zeros(x.shape, x.dtype) for x in out_types]
            for block in itertools.product(*map(range, grid)):
                at.update(zip(grid_names, map(jnp.int32, block), strict=True))
                body(*map(Ref, arrays))
            for before, after in zip(kept, arrays, strict=False):
                assert np.asarray(before).tobytes() == after.tobytes(), f"{name}: changed what is kept"
            rest = list(map(jnp.asarray, arrays[len(kept) :]))
            return rest[len(changed) :], rest[: len(changed)]

        return call

    def when(condition: Any) -> Any:
        return lambda run: run() if bool(condition) else None

    monkeypatch.setattr(module.compat, "gpu_kernel_in_place", in_place)
    monkeypatch.setattr(module, "plgpu", SimpleNamespace(inline_mgpu=_inline, RefType=plgpu.RefType))
    monkeypatch.setattr(module, "pl", SimpleNamespace(cdiv=pl.cdiv, when=when))
    monkeypatch.setattr(jax.lax, "axis_index", at.__getitem__)
