"""Weights on huge pages: on a CPU, a matrix that is read once a token is read faster where the page table is small.

A 4 kB page holds a thousand float32 weights; following the page table then takes a good part of the time that a
decode step spends waiting for memory. Linux gives 2 MB pages to memory that asks for them (`madvise`).
"""

import ctypes
import functools
import mmap
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARENA = 64 << 20  # bytes asked for at a time: many small matrices share huge pages
_SMALL = 64 << 10  # a leaf below it stays where it is
_ALIGNMENT = 64  # what JAX's CPU backend needs to adopt a buffer instead of copying it


class Arenas:
    """Huge-page memory, handed out in pieces; an arena is freed when the last array in it is."""

    def __init__(self):
        self._arena: np.ndarray | None = None
        self._used = 0
        self._lock = threading.Lock()

    def settle(self, tree: Any) -> Any:
        """Return the tree as arrays of the default device; on a CPU with its large leaves copied to huge pages.

        Leaves may be in host memory (numpy), where a layout can be changed without a copy.
        """
        copy = hasattr(mmap, "MADV_HUGEPAGE") and jax.default_backend() == "cpu"
        return jax.tree.map(self._settle if copy else jnp.asarray, tree)

    def _settle(self, leaf: jax.Array | np.ndarray) -> jax.Array:
        if leaf.nbytes < _SMALL:
            return jnp.asarray(leaf)
        source = np.asarray(leaf)
        place = self._take(source.nbytes).view(source.dtype).reshape(source.shape)
        np.copyto(place, source)
        return jax.device_put(place)

    def _take(self, nbytes: int) -> np.ndarray:
        with self._lock:
            if self._arena is None or self._used + nbytes > self._arena.nbytes:
                memory = mmap.mmap(-1, max(_ARENA, nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                memory.madvise(mmap.MADV_HUGEPAGE)
                self._arena, self._used = np.frombuffer(memory, np.uint8), 0
            piece = self._arena[self._used : self._used + nbytes]
            self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        return piece


def give_back_memory() -> None:
    """Return what the C library holds as free to the system; without it a freed copy of a layer stays resident."""
    trim = getattr(_libc(), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)


@functools.cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # a system without a C library by that name
        return None
