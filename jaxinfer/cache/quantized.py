"""Keys and values of one byte a number, with one scale a token and head."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int, Num

from jaxinfer.cache.slots import write
from jaxinfer.errors import InputError, nearest
from jaxinfer.ops.attention import Scaled
from jaxinfer.ops.online_attention import online_attention

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # the largest code of each type


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedCache:
    """The kind of cache that rounds each head of a token to `qtype`: `code * scale`, scale = max |x| / largest code."""

    qtype: Literal["int8", "float8_e4m3fn"] = "int8"

    def __post_init__(self):
        if self.qtype not in LARGEST:
            raise InputError(f"qtype={self.qtype!r}: {nearest(self.qtype, LARGEST)}")

    def create(self, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike) -> "QuantizedLayer":
        """Return an empty cache; attention dequantizes to the dtype of the queries, whatever `dtype` is."""
        shape = (batch, kv_heads, slots)
        codes, scale = jnp.zeros((*shape, head_dim), self.qtype), jnp.zeros((*shape, 1), jnp.bfloat16)
        return QuantizedLayer(k=codes, k_scale=scale, v=codes, v_scale=scale)


@nnx.dataclass
class QuantizedLayer(nnx.Module):
    """Codes `[B, K, S, H]` and their scales `[B, K, S, 1]`; slot s holds position s."""

    k: Num[Array, "B K S H"] = nnx.data()
    k_scale: Float[Array, "B K S 1"] = nnx.data()
    v: Num[Array, "B K S H"] = nnx.data()
    v_scale: Float[Array, "B K S 1"] = nnx.data()

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
        k, v = quantize(k.transpose(0, 2, 1, 3), self.k.dtype), quantize(v.transpose(0, 2, 1, 3), self.v.dtype)
        return QuantizedLayer(
            k=write(self.k, k.values, start, counts),
            k_scale=write(self.k_scale, k.scale, start, counts),
            v=write(self.v, v.values, start, counts),
            v_scale=write(self.v_scale, v.scale, start, counts),
        )

    def attend(
        self,
        q: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> tuple[Float[Array, "B T N H"], "QuantizedLayer"]:
        """Attend over the live slots, a block of them at a time."""
        k, v = Scaled(self.k, self.k_scale), Scaled(self.v, self.v_scale)
        return online_attention(q, k, v, positions, scale=scale, window=window, softcap=softcap), self

    def rewind(self, length: Int[Array, "B"]) -> "QuantizedLayer":
        """Nothing to do: a slot past the length is masked by its position and overwritten by the next append."""
        return self


def quantize(x: Float[Array, "B K T H"], qtype: DTypeLike) -> Scaled:
    """Return codes and scales with `|code * scale - x| <= scale / 2` for int8.

    The scale is rounded to bfloat16 before it divides, which costs nothing: the largest number is still half a step off
    at most (127 / 2^8).
    """
    qtype = jnp.dtype(qtype)
    largest = LARGEST[qtype.name]
    x = x.astype(jnp.float32)
    scale = (jnp.abs(x).max(axis=-1, keepdims=True) / largest).astype(jnp.bfloat16)
    codes = x / jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    codes = jnp.clip(jnp.round(codes) if qtype == jnp.int8 else codes, -largest, largest)
    return Scaled(codes.astype(qtype), scale)
