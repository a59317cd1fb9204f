"""Efficiency techniques: every pass by its name, and how names and options become passes that are applied.

    apply(program, "int8")
    apply(program, "int4:group=32,symmetric=false", "kv_int8")
    apply(program, ("int4", {"group": 32}), Int8(where="unembed"))

A new technique is a file with a `Technique` and a line in `PASSES`.
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from jaxinfer.errors import InputError, nearest
from jaxinfer.passes.base import Calibrated, Technique, option_fields
from jaxinfer.passes.depth.early_exit import EarlyExits
from jaxinfer.passes.depth.skip_decode import SkipDecode
from jaxinfer.passes.depth.skip_layers import SkipLayers
from jaxinfer.passes.kv_cache.fp8 import KVFP8
from jaxinfer.passes.kv_cache.int8 import KVInt8
from jaxinfer.passes.kv_cache.kivi import KVInt4
from jaxinfer.passes.kv_cache.paged import KVPaged
from jaxinfer.passes.kv_cache.window import KVWindow
from jaxinfer.passes.quantization.awq import AWQ
from jaxinfer.passes.quantization.fp8 import FP8
from jaxinfer.passes.quantization.gptq import GPTQ
from jaxinfer.passes.quantization.int4 import Int4
from jaxinfer.passes.quantization.int8 import Int8
from jaxinfer.passes.quantization.llm_int8 import LLMInt8
from jaxinfer.passes.quantization.mixed import Mixed
from jaxinfer.passes.quantization.nf4 import NF4
from jaxinfer.passes.quantization.quarot import QuaRot
from jaxinfer.passes.quantization.smoothquant import SmoothQuant
from jaxinfer.passes.quantization.spinquant import SpinQuant
from jaxinfer.passes.quantization.w4a8 import W4A8
from jaxinfer.passes.quantization.w8a8 import W8A8
from jaxinfer.program import Program

PASSES: dict[str, type[Technique]] = {
    "int8": Int8,
    "int4": Int4,
    "nf4": NF4,
    "fp8": FP8,
    "w8a8": W8A8,
    "w4a8": W4A8,
    "gptq": GPTQ,
    "awq": AWQ,
    "smoothquant": SmoothQuant,
    "llm_int8": LLMInt8,
    "mixed": Mixed,
    "quarot": QuaRot,
    "spinquant": SpinQuant,
    "kv_int8": KVInt8,
    "kv_fp8": KVFP8,
    "kv_int4": KVInt4,
    "kv_paged": KVPaged,
    "kv_window": KVWindow,
    "skip_layers": SkipLayers,
    "early_exit": EarlyExits,
    "skip_decode": SkipDecode,
}
Spec = str | tuple[str, Mapping[str, Any]] | Technique


def apply(program: Program, *specs: Spec, calibration: Any = None) -> Program:
    """Return the program with passes applied from left to right; `calibration` goes to those that need text.

    A program on a mesh stays there, with what is new where its rules say.

    Raises:
        InputError: an unknown pass or option (the nearest are named), a value of the wrong type, a pass that can't
            follow the ones before it (with the reason), or one that matches no node.
    """
    from jaxinfer.sharding.shard import through_mesh  # which needs layouts, and so this package

    passes = [parse(spec) for spec in specs]  # every mistake in writing, before any work
    looks = any(isinstance(technique, Calibrated) for technique in passes)

    def change(program: Program) -> Program:
        for technique in passes:
            if isinstance(technique, Calibrated) and technique.calibration is None:
                technique = dataclasses.replace(technique, calibration=calibration)
            program = technique(program)
        return program

    return through_mesh(change, program, runs=looks) if passes else program


def parse(spec: Spec) -> Technique:
    """Return the pass that a spec names: "name", "name:option=value,option=value", or (name, options).

    Raises:
        InputError: an unknown pass or option, or a value of the wrong type.
    """
    if isinstance(spec, Technique):
        return spec
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        given = options_of(spec, rest) if rest else {}
    else:
        name, given = spec[0], dict(spec[1])
    if name not in PASSES:
        raise InputError(f"no pass {name!r}: {nearest(name, PASSES)}")
    kind = PASSES[name]
    fields = {f.name: f for f in option_fields(kind)}
    types = typing.get_type_hints(kind)
    options = {}
    for key, value in given.items():
        if key not in fields:
            raise InputError(f"{name} has no option {key!r}: {nearest(key, fields)}")
        options[key] = typed(f"{name}:{key}", value, types[key])
    return kind(**options)


def options_of(spec: str, text: str) -> dict[str, str]:
    """Return the options of "a=1,b=x". A comma inside a value is written as it is where no "name=" follows it."""
    options: dict[str, str] = {}
    last = None
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if equals and key.isidentifier():
            options[key], last = value, key
        elif last is not None:
            options[last] += "," + part
        else:
            raise InputError(f"pass {spec!r}: {part!r} is not option=value; write name:option=value,option=value")
    return options


def typed(key: str, value: Any, kind: Any) -> Any:
    """Return an option's value as its field's type; text, as it comes from a command line, is read."""
    kinds = (kind,) if typing.get_origin(kind) is tuple else typing.get_args(kind) or (kind,)
    if isinstance(value, str) and type(None) in kinds and value.lower() in ("none", ""):
        return None
    for want in (k for k in kinds if k is not type(None)):
        origin = typing.get_origin(want) or want
        if origin is bool and isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if origin is tuple and isinstance(value, (list, tuple, str)):
            parts = (value.split("+") if value else ()) if isinstance(value, str) else value
            return tuple(typed(key, part, typing.get_args(want)[0]) for part in parts)
        if origin in (int, float) and not isinstance(value, bool) and isinstance(value, (str, int, float)):
            try:
                number = origin(value)
            except ValueError:
                continue
            if isinstance(value, str) or number == value:
                return number
        if type(value) is origin:
            return value
    if value is None and type(None) in kinds:
        return None
    names = " or ".join("nothing" if k is type(None) else getattr(k, "__name__", str(k)) for k in kinds)
    raise InputError(f"{key}={value!r}: must be {names}")
