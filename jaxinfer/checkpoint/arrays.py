"""Arrays of a leaf: in host memory, and on other processes' devices alone."""

import math

import jax
import numpy as np


def elsewhere(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return the array of which no device of this process has a part."""
    return jax.make_array_from_single_device_arrays(shape.shape, sharding, [], dtype=shape.dtype)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array on a 64-byte boundary, which JAX's CPU backend adopts without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def all_finite(a: np.ndarray) -> bool:
    """Return whether `a` has no NaN and no infinity, without a boolean copy of it."""
    if a.size == 0:
        return True
    if a.dtype.itemsize != 2:
        return bool(np.isfinite(a.min()) and np.isfinite(a.max()))  # both carry a NaN through
    # numpy reduces 16-bit floats one by one; their bit patterns without the sign compare as integers, at full speed.
    infinity = int(np.array(np.inf, a.dtype).view(np.uint16))
    bits = a.reshape(-1).view(np.uint16)
    return all(int((bits[i : i + (1 << 20)] & 0x7FFF).max()) < infinity for i in range(0, bits.size, 1 << 20))
