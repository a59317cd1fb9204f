"""Rotary embedding settings of a Hugging Face config: rope_theta and rope_scaling, or rope_parameters."""

import math
from typing import Any

from jaxinfer.checkpoint.hf_keys import Keys
from jaxinfer.errors import InputError
from jaxinfer.ops.rope import RopeConfig

KINDS = {"default": "default", "linear": "linear", "dynamic": "ntk", "yarn": "yarn", "llama3": "llama3"}


def rope_from_hf(keys: Keys, theta: float, max_context: int) -> RopeConfig:
    """Return the model's one rotary embedding; `theta` is the family's default.

    Raises:
      InputError: the kind is not supported, layers differ in it, or a setting is missing or makes no sense.
    """
    # The old rope_scaling holds all but theta, which stands beside it; rope_parameters holds both.
    spec = keys.object("rope_scaling") or keys.object("rope_parameters") or {}
    if any(isinstance(value, dict) for value in spec.values()):
        raise InputError(f"{keys.path}: rope_parameters is {spec!r:.200}, but only gemma3 may differ by layer type")
    return _rope(spec, keys, keys.number("rope_theta", theta), max_context)


def layer_type_ropes(keys: Keys, theta: float, max_context: int) -> tuple[RopeConfig, RopeConfig]:
    """Return Gemma 3's rotary embedding of global layers and that of local ones; raises as `rope_from_hf` does."""
    nested = keys.object("rope_parameters") or {}
    full, local = nested.get("full_attention") or {}, nested.get("sliding_attention") or {}
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise keys.fail("rope_parameters", "expected an object under full_attention and under sliding_attention")
    full = {**full, **(keys.object("rope_scaling") or {})}
    return (
        _rope(full, keys, keys.number("rope_theta", theta), max_context),
        _rope(local, keys, keys.number("rope_local_base_freq", 10_000.0), max_context),
    )


def _rope(spec: dict[str, Any], keys: Keys, theta: float, max_context: int) -> RopeConfig:
    s = Keys(spec, keys.path)
    kind = s.get("rope_type", s.get("type", "default"))
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{keys.path}: rope_type is {kind!r:.200}; supported: {', '.join(KINDS)}")
    if s.number("partial_rotary_factor", keys.number("partial_rotary_factor", 1.0)) != 1.0:
        holder = s if "partial_rotary_factor" in spec else keys
        raise holder.fail("partial_rotary_factor", "but only rotation of whole heads (1.0) is supported")
    theta = s.number("rope_theta", theta)
    if kind == "default":
        return RopeConfig(theta=theta)

    original = max_context
    if kind in ("yarn", "llama3"):
        original = keys.integer(
            "original_max_position_embeddings", s.integer("original_max_position_embeddings", max_context)
        )
    # A yarn factor may be left to the ratio of the two contexts.
    factor = s.number("factor", max_context / original) if kind == "yarn" else s.number("factor")
    if factor < 1.0:
        raise s.fail("factor", "expected at least 1: a context can only be stretched")
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "dynamic":
        return RopeConfig(theta=theta, kind="ntk", factor=factor, original_context=original)
    if kind == "llama3":
        low, high = s.number("low_freq_factor"), s.number("high_freq_factor")
        if low >= high:
            raise s.fail("high_freq_factor", f"expected more than low_freq_factor, {low}")
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=factor,
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_context=original,
        beta_fast=s.number("beta_fast", 32.0),
        beta_slow=s.number("beta_slow", 1.0),
        attention_factor=_yarn_attention_factor(s, factor),
        truncate=s.flag("truncate", True),
    )


def _yarn_attention_factor(s: Keys, factor: float) -> float | None:
    """Return the scale of cos and sin that the file states, or implies by mscale; None leaves it to the factor."""
    stated = s.number("attention_factor", None)
    mscale, all_dim = s.values.get("mscale"), s.values.get("mscale_all_dim")
    if stated is not None or not (mscale and all_dim):  # as transformers: 0 counts as not given
        return stated

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    return magnitude(s.number("mscale")) / magnitude(s.number("mscale_all_dim"))
