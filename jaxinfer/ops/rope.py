"""Rotary position embedding with the context extensions that released checkpoints use."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.ops.placement import free_axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al., 2104.09864) and how it is stretched beyond the trained context.

    `kind` selects the stretch; the fields below it are read only by the kinds named beside them.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "ntk", "yarn", "llama3"] = "default"
    factor: float = 1.0  # linear, ntk, yarn, llama3
    original_context: int = 0  # ntk, yarn, llama3: tokens seen in pre-training
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scales cos and sin; None derives it from `factor`
    truncate: bool = True  # yarn: round the correction range to whole dimensions


def rotate(x: Float[Array, "B T N H"], positions: Int[Array, "B T"], rope: RopeConfig) -> Float[Array, "B T N H"]:
    """Rotate each half-pair `(x[h], x[h + H/2])` by the angle `position * frequency[h]` (2104.09864)."""
    return _turned(x, *cos_and_sin(rope, x.shape[-1], positions))


def cos_and_sin(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return what `rotate` turns by at those positions, float32."""
    return _angles(rope, head_dim, positions, positions, attention_magnitude(rope))


def turn(
    x: Float[Array, "B T N H"], by: Int[Array, "B T"], positions: Int[Array, "B T"], rope: RopeConfig
) -> Float[Array, "B T N H"]:
    """Return what `rotate` would have given `by` tokens further on; `x` was rotated at `positions`."""
    return _turned(x, *_angles(rope, x.shape[-1], by, positions, 1.0))


def _turned(x: Array, cos: Array, sin: Array) -> Array:
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _angles(rope: RopeConfig, head_dim: int, by: Array, positions: Array, magnitude: float) -> tuple[Array, Array]:
    frequencies = _frequencies(rope, head_dim, positions)  # [H/2], or [B, H/2] where it depends on the length
    angles = by[..., None].astype(jnp.float32) * frequencies[..., None, :]
    cos, sin = _cos_and_sin(angles, positions)
    return cos * magnitude, sin * magnitude


def _cos_and_sin(angles: Float[Array, "B T half"], positions: Int[Array, "B T"]) -> tuple[Array, Array]:
    """Return both. XLA's CPU backend would compute them anew for every head, one number at a time."""

    def both(angles: Array) -> tuple[Array, Array]:
        return jnp.cos(angles), jnp.sin(angles)

    def apart(angles: Array, positions: Array) -> tuple[Array, Array]:
        # What a branch computes is not fused into what reads it, and the compiler can't know that it is always taken.
        return jax.lax.cond(positions[0, 0] >= -1, both, lambda x: (x, x), angles)

    if 0 in positions.shape or free_axes():  # on a mesh, all devices would have to agree on the branch
        return both(angles)
    return jax.lax.platform_dependent(angles, positions, cpu=apart, default=lambda angles, _: both(angles))


def attention_magnitude(rope: RopeConfig) -> float:
    """Return the factor on cos and sin: YaRN sharpens attention by it, every other kind has 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else 0.1 * math.log(rope.factor) + 1.0


def _frequencies(rope: RopeConfig, head_dim: int, positions: Array) -> Array:
    base = _inverse_powers(rope.theta, head_dim)
    match rope.kind:
        case "default":
            return jnp.asarray(base)
        case "linear":
            return jnp.asarray(base / np.float32(rope.factor))
        case "llama3":
            return jnp.asarray(_llama3(rope, base))
        case "yarn":
            return jnp.asarray(_yarn(rope, base, head_dim))
        case "ntk":
            return _dynamic_ntk(rope, head_dim, positions)


def _inverse_powers(theta: float, head_dim: int) -> np.ndarray:
    return (1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)).astype(np.float32)


def _dynamic_ntk(rope: RopeConfig, head_dim: int, positions: Array) -> Array:
    """Stretch the base once a row is longer than the trained context; each row by its own length."""
    length = jnp.maximum(positions.max(axis=1) + 1, rope.original_context).astype(jnp.float32)
    stretch = rope.factor * length / rope.original_context - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    powers = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    return 1.0 / theta[:, None] ** powers


def _llama3(rope: RopeConfig, base: np.ndarray) -> np.ndarray:
    """Llama 3.1: keep high frequencies, divide low ones by `factor`, blend in between."""
    wavelength = 2 * math.pi / base
    turns = rope.original_context / wavelength
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return ((1 - blend) * base / rope.factor + blend * base).astype(np.float32)


def _yarn(rope: RopeConfig, base: np.ndarray, head_dim: int) -> np.ndarray:
    """YaRN (2309.00071): interpolate the dimensions that turn less than `beta_slow` times in the trained context."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = max(high - low, 1e-3)
    interpolated = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (base / rope.factor * interpolated + base * (1 - interpolated)).astype(np.float32)
