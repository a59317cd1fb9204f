"""Quantized weights as leaves of a model: `qwix.QArray` for whole bytes, `Packed` for two values a byte.

Both stand where an array stood. `w ~ code * scale + offset`, with one scale (and offset) for each tile of the weight:
`scale` has the weight's rank, and every axis of it divides the weight's.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Integer
from qwix import QArray

RUN = 32  # entries of the last axis packed together: the first half in the low nibbles, the second in the high ones
# NormalFloat4 (QLoRA, 2305.14314): quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FOUR_BIT = ("int4", "uint4", "nf4")


@flax.struct.dataclass
class Packed:
    """What a QArray can't say: values of 4 bits, two in a byte on every backend; fractional offsets; scales of a file.

    Of each run of 32 entries of the last axis (of the whole axis where 32 does not divide it), byte j holds entry j in
    its low nibble and entry j + half a run in its high one, as the blocks of a GGUF file do. `qtype` says what a value
    means: "int4" is -8..7, "uint4" 0..15, "nf4" an index into `NF4`; "int8" takes a whole byte.
    """

    values: Any  # uint8 [..., I / 2], or int8 [..., I]
    scale: Any  # float [..., I / group]
    offset: Any  # None, or like scale: the weight that code 0 stands for
    qtype: str = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)  # the float dtype that it stands for

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        *rest, last = self.values.shape
        return (*rest, last * (2 if self.qtype in FOUR_BIT else 1))

    @property
    def ndim(self) -> int:
        """The rank of the weight."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


nnx.register_data_type(Packed)
Quantized = QArray | Packed


def is_quantized(leaf: Any) -> bool:
    """Return whether a leaf is a quantized weight."""
    return isinstance(leaf, (QArray, Packed))


def pack(codes: Integer[Array, "*A I"]) -> Integer[Array, "*A J"]:
    """Return 4-bit codes two in a byte; negative ones in two's complement.

    Raises:
        ValueError: an odd last axis.
    """
    half = _half(codes.shape[-1])
    low, high = jnp.split((codes & 15).astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2 * half), 2, axis=-1)
    return (low | high << 4).reshape(*codes.shape[:-1], -1)


def unpack(values: Integer[Array, "*A J"]) -> Integer[Array, "*A I"]:
    """Return the nibbles of packed bytes in the order of the weight, 0..15: the inverse of `pack`."""
    half = _half(2 * values.shape[-1])
    runs = values.reshape(*values.shape[:-1], -1, half)
    return jnp.concatenate([runs & 15, runs >> 4], axis=-1).reshape(*values.shape[:-1], -1)


def _half(last: int) -> int:
    if last % 2:
        raise ValueError(f"a last axis of {last}: must be even to hold two values a byte")
    return RUN // 2 if last % RUN == 0 else last // 2


def codes(leaf: Quantized) -> Array:
    """Return what a leaf stores, one value an entry, without its scale: int8, fp8, or float32 for nf4."""
    if isinstance(leaf, QArray):
        if leaf.zero_point is not None:
            raise ValueError("a QArray with a zero point: store its offset in a Packed instead")
        return leaf.qvalue
    if leaf.qtype not in FOUR_BIT:
        return leaf.values
    nibbles = unpack(leaf.values)
    if leaf.qtype == "nf4":
        return jnp.asarray(np.array(NF4, np.float32))[nibbles]
    nibbles = nibbles.astype(jnp.int8)
    return (nibbles ^ 8) - 8 if leaf.qtype == "int4" else nibbles


def dequantize(leaf: Array | Quantized, dtype: DTypeLike | None = None) -> Float[Array, "..."]:
    """Return the weight that a leaf stands for, computed in float32; arrays pass through."""
    if not is_quantized(leaf):
        return leaf if dtype is None else leaf.astype(dtype)
    w = _tiled(jnp.multiply, codes(leaf).astype(jnp.float32), leaf.scale)
    offset = getattr(leaf, "offset", None)
    if offset is not None:
        w = _tiled(jnp.add, w, offset)
    return w.astype(leaf.dtype if dtype is None else dtype)


def take_rows(table: Array | Quantized, index: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """Return rows of a table `[V, D]`; of a quantized one only these rows are dequantized.

    Raises:
        ValueError: rows of the table share a scale.
    """
    if not is_quantized(table):
        return jnp.take(table, index, axis=0)
    if table.scale.shape[0] != table.shape[0]:
        raise ValueError("rows of a quantized table share a scale: quantize it row by row")
    return dequantize(jax.tree.map(lambda part: jnp.take(part, index.reshape(-1), axis=0), table)).reshape(
        *index.shape, -1
    )


def nbytes(tree: Any) -> int:
    """Return the bytes of a tree's buffers as they lie on the device; of shapes, what they would take."""

    def size(leaf: Any) -> int:
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            return leaf.on_device_size_in_bytes()
        return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize

    return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _tiled(op: Any, w: Float[Array, "..."], tiles: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return `op(w, tiles)` where each entry of `tiles` meets its tile of `w`, without a copy of `tiles`."""
    split, tile = [], []
    for size, count in zip(w.shape, tiles.shape, strict=True):
        split += [count, size // count]
        tile += [count, 1]
    return op(w.reshape(split), tiles.reshape(tile).astype(w.dtype)).reshape(w.shape)
