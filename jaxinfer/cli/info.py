"""Show what a model is and how it runs here, from its headers: no weight is read.

jaxinfer info smollm2-135m
jaxinfer info smollm2-135m --pass int4 --pass kv_int8        # what it would take
jaxinfer info smollm2-135m --keep-quantized
jaxinfer info --config configs/tiny.py --json
"""

import argparse
import json
from typing import Any

from jaxinfer.cli import options
from jaxinfer.errors import InputError

_PARTS = ("embedding", "attention", "mlp", "norms", "unembedding")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `jaxinfer info`."""
    parser.add_argument("name", nargs="?", metavar="MODEL", help="name, path or hub repository (default: smollm2-135m)")
    options.add_model(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    options.take_positional(args)
    config = options.read_config(args)
    report = describe(config)
    print(json.dumps(report) if args.json else _text(report))


def describe(config) -> dict[str, Any]:
    """Return everything that the command shows, as JSON types."""
    import jax
    import jax.numpy as jnp

    from jaxinfer import configuration, device, loading, passes
    from jaxinfer.checkpoint import orbax
    from jaxinfer.checkpoint.registry import resolve
    from jaxinfer.checkpoint.source import open_source
    from jaxinfer.models.config import config_from_dict, config_to_dict
    from jaxinfer.models.transformer import abstract
    from jaxinfer.ops.implementation import describe as describe_kernels
    from jaxinfer.passes.quantization.file_blocks import hold_blocks
    from jaxinfer.program import Program
    from jaxinfer.text.tokenizer import Tokenizer

    loading.enable_compilation_cache()
    dtype, layouts = config.dtype, None
    stored: dict[str, int] = {}
    applied: list[Any] = []
    blocks: dict[str, str] = {}
    if config.architecture:
        name, path = "random weights", None
        model_config = configuration.architecture(config)
        tokenizer, stop_ids, sampling = configuration.tokenizer_of(model_config), (), {}
    else:
        name, path = config.model, resolve(config.model)
        if orbax.is_saved(path):
            if config.keep_quantized:
                raise InputError(f"{path}: {loading.SAVED_AS_IT_IS}")
            saved = orbax.read_metadata(path)
            model_config, stop_ids, sampling = config_from_dict(saved["config"]), saved["stop_ids"], saved["sampling"]
            tokenizer = Tokenizer.load(path / "tokenizer") if (path / "tokenizer").is_dir() else None
            applied, blocks = [tuple(spec) for spec in saved.get("passes", [])], saved.get("blocks", {})
            dtype, layouts = dtype or saved["dtype"], saved["layouts"]  # as it was saved, whatever is fastest here
        else:
            source = open_source(path)
            model_config, tokenizer = source.config, source.tokenizer
            stop_ids, sampling = source.stop_ids, source.sampling
            blocks = loading.kinds_to_keep(source) if config.keep_quantized else {}
            for entry in source.entries.values():
                stored[entry.dtype] = stored.get(entry.dtype, 0) + entry.nbytes
    choice = device.choose(model_config, None if dtype is None else jnp.dtype(dtype))
    shapes = abstract(model_config, choice.dtype)
    parameters = _parameters(shapes)
    model = passes.apply(Program(hold_blocks(shapes, blocks)), *applied, *config.passes).model
    cache = jax.eval_shape(lambda: model.init_cache(1, 256))
    windows = [model_config.window(i) for i in range(model_config.num_layers)]
    return {
        "model": name,
        "path": None if path is None else str(path),
        "architecture": config_to_dict(model_config),
        "windows": {str(w): windows.count(w) for w in dict.fromkeys(windows) if w is not None},
        "parameters": parameters,
        "passes": [str(spec) if isinstance(spec, str) else spec[0] for spec in (*applied, *config.passes)],
        "bytes_stored": stored,
        "bytes_in_memory": _bytes(model),
        "kv_bytes_per_token": sum(_bytes(cache.layers).values()) // 256,
        "tokenizer": _tokenizer(tokenizer, stop_ids),
        "sampling": dict(sampling),
        "device": {
            "kind": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
            "count": jax.device_count(),
            "dtype": choice.dtype.name,
            "layouts": list(choice.layouts if layouts is None else layouts),
            "kernels": describe_kernels(),
            "measured": choice.describe(),
            "compile_cache": jax.config.jax_compilation_cache_dir,
        },
    }


def _parameters(model) -> dict[str, int]:
    """Return how many parameters each part has."""
    from jaxinfer import tree

    counts = dict.fromkeys(_PARTS, 0)
    for path, leaf in tree.leaves(model).items():
        if "norm" in path:
            part = "norms"
        elif path.startswith("layers."):
            part = "attention" if ".attention." in path else "mlp"
        else:
            part = "embedding" if path.startswith("embed.") else "unembedding"
        counts[part] += leaf.size
    return {"total": sum(counts.values()), **{part: n for part, n in counts.items() if n}}


def _bytes(tree: Any) -> dict[str, int]:
    """Return the bytes of a tree's leaves by dtype."""
    import jax

    sizes: dict[str, int] = {}
    for leaf in jax.tree.leaves(tree):
        sizes[str(leaf.dtype)] = sizes.get(str(leaf.dtype), 0) + leaf.size * leaf.dtype.itemsize
    return sizes


def _tokenizer(tokenizer, stop_ids) -> dict[str, Any] | None:
    if tokenizer is None:
        return None
    return {
        "tokens": tokenizer.vocab_size,
        "stop_ids": list(stop_ids),
        "stop_tokens": [tokenizer.decode([i], skip_special=False) for i in stop_ids],
        "chat_template": tokenizer.chat_template is not None,
    }


def _text(report: dict[str, Any]) -> str:
    a, d, t = report["architecture"], report["device"], report["tokenizer"]
    total = report["parameters"]["total"]
    layers = f"{a['num_layers']} layers, width {a['embed_dim']}, MLP {a['mlp_dim']}"
    heads = f"{a['num_heads']} query heads, {a['num_kv_heads']} KV heads of {a['head_dim']}"
    rows = [
        ("model", report["model"]),
        ("path", report["path"]),
        (
            "architecture",
            f"{a['family']}, {layers}, {heads}",
        ),
        ("experts", a["moe"] and f"{a['moe']['num_experts']}, {a['moe']['experts_per_token']} a token"),
        ("context", f"{a['max_context']} tokens"),
        ("windows", ", ".join(f"{n} layers see {w} tokens" for w, n in report["windows"].items())),
        ("parameters", f"{total:,}"),
        *(("", f"{n:>15,}  {part}") for part, n in report["parameters"].items() if part != "total"),
        ("stored", ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in report["bytes_stored"].items())),
        ("in memory", ", ".join(f"{n / 1e6:.1f} MB {kind}" for kind, n in report["bytes_in_memory"].items())),
        ("passes", " + ".join(report["passes"])),
        ("KV cache", f"{report['kv_bytes_per_token']:,} bytes a token"),
        ("tokenizer", t and f"{t['tokens']} tokens, {'a' if t['chat_template'] else 'no'} chat template"),
        ("stops at", t and ", ".join(f"{s!r} ({i})" for i, s in zip(t["stop_ids"], t["stop_tokens"], strict=True))),
        ("sampling", ", ".join(f"{k} {v:g}" for k, v in report["sampling"].items()) or "greedy"),
        ("device", f"{d['count']} x {d['kind']} ({d['platform']})"),
        ("runs as", f"{d['dtype']}, {' and '.join(d['layouts']) or 'separate'} layout; measured:"),
        *(("", line) for line in d["measured"]),
        ("kernels", d["kernels"]),
        ("compile cache", d["compile_cache"] or "off"),
    ]
    return "\n".join(f"{key:14s} {value}" for key, value in rows if value)
