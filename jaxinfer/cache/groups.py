"""Keys and values of 2 or 4 bits, in groups of consecutive tokens: a grid for each channel of a group's keys.

Keys have channels that are large in every token, values do not (KIVI, 2402.02750).
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, UInt8

from jaxinfer.cache.slots import pick, take_rows
from jaxinfer.ops.scatter import put_box

GRID_DTYPE = jnp.bfloat16


@nnx.dataclass
class Groups(nnx.Module):
    """M groups of G tokens, S = M * G in all: numbers `code * scale + offset`, with n = 8 / bits codes in each byte.

    Byte row r of a group's G / n holds the codes of its tokens r, r + G / n, r + 2 G / n ..., the first in its lowest
    bits: the layout of `pallas_kernels.kivi_attention`. Keys have a grid a group and channel, values one a token and
    run of channels, of which a head has KR / K.
    """

    k_codes: UInt8[Array, "B K bytes H"] = nnx.data()
    k_scale: Float[Array, "B K M H"] = nnx.data()
    k_offset: Float[Array, "B K M H"] = nnx.data()
    v_codes: UInt8[Array, "B K bytes H"] = nnx.data()
    v_scale: Float[Array, "B KR S"] = nnx.data()
    v_offset: Float[Array, "B KR S"] = nnx.data()

    @property
    def count(self) -> int:
        """How many groups there are, M."""
        return self.k_scale.shape[2]

    @property
    def size(self) -> int:
        """How many tokens are in a group, G."""
        return self.v_scale.shape[2] // self.count

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return 8 * self.k_codes.shape[2] // self.v_scale.shape[2]

    @property
    def kv_heads(self) -> int:
        """How many heads there are, K."""
        return self.k_codes.shape[1]

    @property
    def together(self) -> int:
        """How many groups lie together, so that only runs of them can be cut: each lies alone."""
        return 1

    def cut(self, start: Int[Array, ""], count: int) -> "Groups":
        """Return groups start .. start + count - 1."""

        def part(x):
            own = x.shape[2] // self.count
            return jax.lax.dynamic_slice_in_dim(x, start * own, count * own, axis=2)

        return jax.tree.map(part, self)

    def of_rows(self, index: Int[Array, "B"]) -> "Groups":
        """Return one group of each row: group index[b] of row b."""

        def part(x):
            own = x.shape[2] // self.count
            rows, heads = jnp.arange(len(x))[:, None, None], jnp.arange(x.shape[1])[:, None]
            return x[rows, heads, index[:, None, None] * own + jnp.arange(own)]

        return jax.tree.map(part, self)

    def rows(self) -> "Groups":
        """Return every row's groups, in rows of its own: that they are already."""
        return self

    def write(self, new: "Groups", first: Int[Array, "B"], counts: Int[Array, "B"]) -> "Groups":
        """Return the groups with each row's first counts[b] new ones at its places from first[b]."""

        def part(old, x):
            own = old.shape[2] // self.count
            return pick(old, x, jnp.arange(old.shape[2]) - first[:, None] * own, counts * own)

        return jax.tree.map(part, self, new)

    def write_one(self, new: "Groups", row: Int[Array, ""], index: Int[Array, ""]) -> "Groups":
        """Return the groups with the one group of one row in `new` at group `index` of row `row`, in place."""

        def part(old, x):
            return put_box(old, (row, 0, index * (old.shape[2] // self.count)), x)

        return jax.tree.map(part, self, new)

    def take(self, rows: Int[Array, "n"]) -> "Groups":
        """Copy the rows."""
        return take_rows(self, rows)

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "Groups":
        """Copy the rows: nothing is shared."""
        return take_rows(self, rows)


def empty_groups(
    batch: int, kv_heads: int, count: int, group: int, head_dim: int, bits: int, dtype: DTypeLike
) -> Groups:
    """Return `count` groups in each of `batch` rows that hold nothing yet, of numbers of a dtype."""
    new = [jax.ShapeDtypeStruct((batch, kv_heads, count, group, head_dim), dtype)] * 2
    groups = jax.eval_shape(functools.partial(quantize_groups, bits=bits), *new)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), groups)


def packed_before(positions: Int[Array, "*B"], group: int, residual: int) -> Int[Array, "*B"]:
    """Return how many tokens are packed for a query at each position: whole groups, and `residual` newer ones are not.

    The kernels of `pallas_kernels` know the same rule.
    """
    return group * jnp.maximum(0, (positions + 1 - residual) // group)


def quantize_groups(k: Float[Array, "B K M G H"], v: Float[Array, "B K M G H"], bits: int) -> Groups:
    """Return the groups in `bits` bits a number; a run of value channels is G long, or all H where G does not divide H.

    Every number is within half a scale of what it was, up to float rounding.
    """
    B, K, M, G, H = k.shape
    run = G if H % G == 0 else H
    keys, k_scale, k_offset = _fit(k, 3, bits)
    values, *grids = _fit(v.reshape(B, K, M * G, H // run, run), 4, bits)
    v_scale, v_offset = (x[..., 0].transpose(0, 1, 3, 2).reshape(B, -1, M * G) for x in grids)
    pack = functools.partial(_pack, bits=bits)
    return Groups(pack(keys), k_scale[..., 0, :], k_offset[..., 0, :], pack(values.reshape(k.shape)), v_scale, v_offset)


def dequantize_groups(groups: Groups, dtype: DTypeLike) -> tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Return the keys and values of the groups' tokens."""
    B, K, M, H = groups.k_scale.shape
    S = groups.v_scale.shape[2]

    def of_channels(x):  # [B, K * runs, S] -> [B, K, S, runs, 1]
        return x.reshape(B, K, -1, S).transpose(0, 1, 3, 2)[..., None]

    keys, values = (_unpack(x, M, groups.bits) for x in (groups.k_codes, groups.v_codes))
    k = keys * groups.k_scale[:, :, :, None] + groups.k_offset[:, :, :, None]
    scale, offset = of_channels(groups.v_scale), of_channels(groups.v_offset)
    v = values.reshape(*scale.shape[:4], -1) * scale + offset
    return k.reshape(B, K, S, H).astype(dtype), v.reshape(B, K, S, H).astype(dtype)


def _fit(x: Array, axis: int, bits: int) -> tuple[Array, Array, Array]:
    """Return codes, and the scales and offsets of the grids that span the smallest and largest number along `axis`."""
    x, top = x.astype(jnp.float32), 2**bits - 1
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    offset = _rounded(low)
    # Where rounding put the offset above the smallest number, that one must still be half a scale away at most.
    scale = _rounded(jnp.maximum((high - offset) / top, 2 * (offset - low)))
    codes = (x - offset) / jnp.where(scale > 0, scale, 1)
    grid = (part.astype(GRID_DTYPE) for part in (scale, offset))
    return jnp.clip(jnp.round(codes), 0, top).astype(jnp.uint8), *grid


def _rounded(x: Array) -> Array:
    """Return numbers as the grids' dtype has them, still in float32: XLA leaves out a cast there and back."""
    kind = jnp.finfo(GRID_DTYPE)
    return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


def _pack(codes: Array, bits: int) -> Array:
    """Return `[B, K, M, G, H]` codes as bytes `[B, K, M * G * bits / 8, H]`."""
    B, K, M, G, H = codes.shape
    parts = jnp.split(codes, 8 // bits, axis=3)
    packed = sum(part << (bits * i) for i, part in enumerate(parts)).astype(jnp.uint8)
    return packed.reshape(B, K, M * G * bits // 8, H)


def _unpack(packed: Array, groups: int, bits: int) -> Array:
    """Return the codes of M groups as float32 `[B, K, M, G, H]`. A broadcast and a reshape, which fuse."""
    B, K, _, H = packed.shape
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)[:, None, None]
    codes = (packed.reshape(B, K, groups, 1, -1, H) >> shifts) & jnp.uint8(2**bits - 1)
    return codes.reshape(B, K, groups, -1, H).astype(jnp.float32)
