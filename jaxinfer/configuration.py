"""Configs: Python files that return a ConfigDict, checked against the keys that exist. Plain values go on from here."""

import dataclasses
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxinfer import device, loading, passes
from jaxinfer.errors import InputError, nearest
from jaxinfer.eval.data import read_text
from jaxinfer.models.config import ModelConfig, MoeConfig, config_from_dict
from jaxinfer.models.transformer import random
from jaxinfer.ops.rope import RopeConfig
from jaxinfer.passes.base import Calibrated
from jaxinfer.passes.calibration import Calibration
from jaxinfer.program import Program
from jaxinfer.sharding.mesh import parse_mesh, simulate_devices
from jaxinfer.sharding.rules import DEFAULT
from jaxinfer.sharding.shard import find_rules, shard
from jaxinfer.speculation import VERIFIERS, check_drafter, speculative
from jaxinfer.text.bytes import VOCAB_SIZE, byte_tokenizer
from jaxinfer.text.tokenizer import Tokenizer

_NESTED = {"rope": RopeConfig, "rope_local": RopeConfig, "moe": MoeConfig}


def defaults() -> ConfigDict:
    """Return a config with every key at its default. A config file changes what it wants and returns it.

    `model` is a name, a path or a hub repository. `dtype` None is what the device runs fastest. `keep_quantized` leaves
    a GGUF file's Q8_0, Q4_0 and Q4_1 weights as they are. `architecture`, when it has keys, gives the fields of a
    ModelConfig to fill with random weights in place of `model`. `passes` are applied in order: "int8", "int4:group=32",
    ("int4", {"group": 32}). `mesh` is the devices to run on, "data=2,model=4", divided by the `rules` of a name.
    `calibration` is for passes that need text: its file, how many windows of how many tokens, and the directory from
    which a killed run goes on.
    `drafter` speculates ("ngram", "self:passes=int4": see `jaxinfer.speculation`), and `verifier` says how sampled
    drafts are checked.
    """
    return ConfigDict(
        {
            "model": "smollm2-135m",
            "dtype": None,
            "keep_quantized": False,
            "architecture": {},
            "passes": (),
            "mesh": "",
            "rules": DEFAULT,
            "calibration": {"text": "", "windows": 64, "window": 512, "directory": ""},
            "drafter": "",
            "verifier": "coupled",
            "generate": {
                "max_new_tokens": 128,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "seed": 0,
                "stop": (),
            },
        }
    )


def read_config(spec: str) -> ConfigDict:
    """Return what `get_config` of a Python file returns; in "file.py:argument" it is called with the argument.

    Raises:
        InputError: no such file, no get_config in it, an unknown key, or a value of the wrong type.
    """
    name, argument = (spec, None) if Path(spec).is_file() or ":" not in spec else spec.rsplit(":", 1)
    if not Path(name).is_file():
        raise InputError(f"config {name!r}: no such file; give the path of a Python file with get_config()")
    try:
        get_config = runpy.run_path(name).get("get_config")
        if not callable(get_config):
            raise InputError("has no function get_config(argument=None)")
        config = get_config() if argument is None else get_config(argument)
        if not isinstance(config, ConfigDict):
            raise InputError(f"get_config() returned a {type(config).__name__}, not an ml_collections.ConfigDict")
        return check(config)
    except Exception as e:  # the file is the user's program: whatever it raises is about its content
        reason = str(e) if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
        raise InputError(f"config {spec}: {' '.join(reason.split())}") from e


def check(config: ConfigDict) -> ConfigDict:
    """Return the defaults with the values of `config`, which may leave keys out.

    Raises:
        InputError: a key that does not exist (the nearest is named), or a value of the wrong type.
    """
    merged = defaults()
    for key, value in config.items():
        _check_key(key, merged, "")
        if key in ("generate", "calibration"):
            for name, option in _mapping(key, value):
                _check_key(name, merged[key], f"{key}.")
                merged[key][name] = _typed(f"{key}.{name}", option, merged[key][name])
        elif key == "keep_quantized":
            merged.keep_quantized = _typed(key, value, False)
        elif key == "passes":
            merged.passes = tuple(_passes(value))
        elif key == "architecture":
            merged.architecture = ConfigDict(dict(_mapping(key, value)))
        elif key == "model" or value is not None:
            merged[key] = _typed(key, value, "")
    if merged.drafter:
        check_drafter(merged.drafter)
    if merged.verifier not in VERIFIERS:
        raise InputError(f"verifier={merged.verifier!r}: {nearest(merged.verifier, VERIFIERS)}")
    if merged.dtype not in (None, *loading.DTYPES):
        raise InputError(f"dtype={merged.dtype!r}: {nearest(merged.dtype, loading.DTYPES)}")
    if merged.mesh:
        parse_mesh(merged.mesh)
    find_rules(merged.rules)
    if merged.architecture:
        architecture(merged)
        if merged.keep_quantized:
            raise InputError("keep_quantized=True: is for GGUF files, and architecture asks for random weights")
    return merged


def from_config(config: ConfigDict, progress: bool = False) -> Program:
    """Return the program that a config describes: a checkpoint, or random weights that read and write bytes.

    `progress` shows a bar while a checkpoint is read.

    Raises:
        InputError: an unknown key, a wrong value, or whatever loading the model raises.
    """
    config = check(config)
    if config.mesh:
        simulate_devices(parse_mesh(config.mesh))
    program = _without_passes(config, progress)
    program = passes.apply(program, *config.passes, calibration=_calibration(config, program, progress))
    if config.drafter:
        program = speculative(program, config.drafter, verifier=config.verifier)
    return shard(config.mesh, config.rules)(program) if config.mesh else program


def _without_passes(config: ConfigDict, progress: bool) -> Program:
    if not config.architecture:
        options = dict(dtype=config.dtype, progress=progress, keep_quantized=config.keep_quantized)
        return loading.load(config.model, **options, mesh=config.mesh or None, rules=config.rules)
    loading.enable_compilation_cache()
    model_config = architecture(config)
    choice = device.choose(model_config, config.dtype and jnp.dtype(config.dtype))
    model = loading.lay_out(random(model_config, dtype=choice.dtype), choice.layouts)
    name = f"random {model_config.family}"
    return Program(model, tokenizer=tokenizer_of(model_config), layouts=choice.layouts, name=name)


def _calibration(config: ConfigDict, program: Program, progress: bool) -> Calibration | None:
    c = config.calibration
    if not c.text:
        return None
    if not any(isinstance(passes.parse(spec), Calibrated) for spec in config.passes):
        raise InputError(f"calibration text {c.text}: no pass here looks at text; leave it out, or add one that does")
    text, directory = read_text(c.text), c.directory or None
    return Calibration.of(program, text, c.windows, c.window, directory=directory, progress=progress)


def _passes(value: Any) -> Iterator[Any]:
    """Yield each pass of a config as `passes.parse` takes it."""
    if not isinstance(value, (list, tuple)):
        raise InputError(f"passes={value!r}: must be a list, such as ['int8', ('int4', {{'group': 32}})]")
    for spec in value:
        if not isinstance(spec, str):
            if not (isinstance(spec, (list, tuple)) and len(spec) == 2 and isinstance(spec[1], (dict, ConfigDict))):
                raise InputError(f"passes has {spec!r}: each must be 'name:option=value' or (name, {{option: value}})")
            spec = (spec[0], dict(spec[1]))
        passes.parse(spec)
        yield spec


def tokenizer_of(config: ModelConfig) -> Tokenizer | None:
    """Return the tokenizer of a model with random weights: of bytes, or none where the vocabulary can't hold them."""
    return byte_tokenizer() if config.vocab_size >= VOCAB_SIZE else None


def architecture(config: ConfigDict) -> ModelConfig:
    """Return the ModelConfig that `config.architecture` spells out; fields that have a default may be left out."""
    given = config.architecture.to_dict()
    where = "architecture."
    for key, kind in _NESTED.items():
        if given.get(key) is not None:
            _check_fields(given[key], kind, f"{where}{key}.")
    _check_fields(given, ModelConfig, where)
    moe = given.get("moe")
    filled = {
        **given,
        "windows": given.get("windows", ()),
        "rope": given.get("rope", {}),
        "rope_local": given.get("rope_local"),
        "moe": None if moe is None else {"layers": None, **moe},
    }
    return config_from_dict(filled)


def _check_fields(given: Any, kind: type, where: str) -> None:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key, _ in _mapping(where.rstrip("."), given):
        _check_key(key, fields, where)
    required = [n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in given]:
        raise InputError(f"{where.rstrip('.')} has no {', '.join(missing)}: every {kind.__name__} needs them")


def _check_key(key: str, known: Any, where: str) -> None:
    if key not in known:
        raise InputError(f"unknown key {where + key!r}: {nearest(key, known)}")


def _mapping(key: str, value: Any) -> Any:
    if not isinstance(value, (dict, ConfigDict)):
        raise InputError(f"{key}={value!r}: must be a dictionary")
    return value.items()


def _typed(key: str, value: Any, default: Any) -> Any:
    """Return `value` as the type of `default`; whole numbers are fine for floats."""
    if isinstance(default, tuple) and isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default) or isinstance(default, tuple):
        wanted = "a list of strings" if isinstance(default, tuple) else type(default).__name__
        raise InputError(f"{key}={value!r}: must be {wanted}")
    return value
