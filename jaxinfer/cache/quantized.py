"""Keys and values of one byte a number, with one scale a token and head."""

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Int8, UInt8

from jaxinfer.cache.slots import move, take_rows, write
from jaxinfer.errors import InputError, nearest
from jaxinfer.ops.attention import Scaled
from jaxinfer.ops.attention_parts import Part, attention_part
from jaxinfer.ops.online_attention import online_attention
from jaxinfer.ops.token_tree import TokenTree

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest code of each type
QType = Literal["int8", "float8_e4m3fn"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedCache:
    """The kind of cache that rounds each head of a token to `qtype`: `code * scale`, scale = max |x| / largest code."""

    qtype: QType = "int8"

    def __post_init__(self):
        if self.qtype not in LARGEST:
            raise InputError(f"qtype={self.qtype!r}: {nearest(self.qtype, LARGEST)}")

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "QuantizedLayer":
        """Return an empty cache; attention dequantizes to the dtype of the queries, whatever `dtype` is."""
        shape = (batch, kv_heads, slots)
        # Two arrays, not one twice: a donated buffer belongs to one of them.
        k, v = (jnp.zeros((*shape, head_dim), jnp.int8 if self.qtype == "int8" else jnp.uint8) for _ in range(2))
        k_scale, v_scale = (jnp.zeros(shape, jnp.bfloat16) for _ in range(2))
        return QuantizedLayer(k=k, k_scale=k_scale, v=v, v_scale=v_scale, qtype=self.qtype)


@nnx.dataclass
class QuantizedLayer(nnx.Module):
    """Codes `[B, K, S, H]` and their scales `[B, K, S]`; slot s holds position s."""

    k: Int8[Array, "B K S H"] | UInt8[Array, "B K S H"] = nnx.data()
    k_scale: Float[Array, "B K S"] = nnx.data()
    v: Int8[Array, "B K S H"] | UInt8[Array, "B K S H"] = nnx.data()
    v_scale: Float[Array, "B K S"] = nnx.data()
    qtype: QType = nnx.static(kw_only=True)
    stores: ClassVar[tuple[str, ...]] = ("k", "v", "k_scale", "v_scale")  # see `rotated`

    @property
    def exact_rewind(self) -> None:
        """Any number of tokens: each has its own slot."""
        return None

    def append(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> "QuantizedLayer":
        """Quantize the new tokens and write each row's first counts[b] at its own slots."""
        k, v = (quantize(x.transpose(0, 2, 1, 3), self.qtype) for x in (k, v))
        return QuantizedLayer(
            k=write(self.k, k.values, start, counts),
            k_scale=write(self.k_scale, k.scale, start, counts),
            v=write(self.v, v.values, start, counts),
            v_scale=write(self.v_scale, v.scale, start, counts),
            qtype=self.qtype,
        )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T N H"], "QuantizedLayer"]:
        """Attend over the live slots, a block of them at a time."""
        k, v = Scaled(self.k, self.k_scale), Scaled(self.v, self.v_scale)
        return online_attention(q, k, v, positions, scale=scale, window=window, softcap=softcap, tree=tree), self

    def attend_part(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        first_slot: Int[Array, ""],
        **options: Any,
    ) -> Part:
        """Attend over the live slots as those from position `first_slot` on, a part of what the queries see."""
        k, v = Scaled(self.k, self.k_scale), Scaled(self.v, self.v_scale)
        return attention_part(q, k, v, positions, first_slot, **options)

    def rewind(self, length: Int[Array, "B"]) -> "QuantizedLayer":
        """Nothing to do: a slot past the length is masked by its position and overwritten by the next append."""
        return self

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> "QuantizedLayer":
        """Move the codes of the path's tokens, and their scales, to the slots of their positions."""
        return jax.tree.map(lambda store: move(store, start, nodes, counts), self)

    def take(self, rows: Int[Array, "n"]) -> "QuantizedLayer":
        """Copy the rows."""
        return take_rows(self, rows)

    def fork(self, rows: Int[Array, "n"], length: Int[Array, "n"], room: int) -> "QuantizedLayer":
        """Copy the rows: nothing is shared."""
        return take_rows(self, rows)


def quantize(x: Float[Array, "B K T H"], qtype: QType) -> Scaled:
    """Return codes (of fp8 the bits) and scales with `|code * scale - x| <= scale / 2` for int8.

    The scale is rounded to bfloat16 before it divides, which costs nothing: the largest number is still half a step off
    at most (127 / 2^8).
    """
    largest = LARGEST[qtype]
    x = x.astype(jnp.float32)
    scale = (jnp.abs(x).max(axis=-1) / largest).astype(jnp.bfloat16)
    codes = x / jnp.where(scale > 0, scale, 1).astype(jnp.float32)[..., None]
    if qtype == "int8":
        return Scaled(jnp.clip(jnp.round(codes), -largest, largest).astype(jnp.int8), scale)
    codes = jnp.clip(codes, -largest, largest).astype(qtype)
    return Scaled(jax.lax.bitcast_convert_type(codes, jnp.uint8), scale)
