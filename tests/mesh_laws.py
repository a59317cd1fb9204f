"""Run every pass and decoder on eight simulated devices, and print how far each is from one device."""

import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from models import random_program, tiny_config, tiny_moe

import jaxinfer as ji
from jaxinfer.passes import apply
from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.program import Program
from jaxinfer.sharding.rules import DEFAULT
from jaxinfer.sharding.shard import shard
from jaxinfer.sharding.specs import cache_shardings
from jaxinfer.tree import leaves

MESHES = {
    "dense": ("data=2,model=4", "fsdp=8", "fsdp=2,model=4", "context=2,fsdp=2,model=2"),
    "experts": ("data=2,expert=4", "expert=2,model=4", "context=2,expert=4"),
}
CACHES = ("context=4,model=2",)  # with what is about caches: too few tokens for each device, so all have them
TABLES = (  # rules beside the default ones, which each strategy's mesh axis asks for
    ("dense", "fully_sharded", "data=2,fsdp=2,model=2"),
    ("dense", "tensor", "context=2,model=4"),
    ("dense", "data", "data=2,context=2,model=2"),
    ("experts", "expert", "expert=2,model=4"),
    ("experts", "mixed", "context=2,model=4"),
)
BATCH, SLOTS, CHUNK = 4, 64, 16
OPTIONS = {
    "kv_int4": {"group": 8, "residual": 8},  # so that some groups of a short text are packed
    "kv_paged": {"page": 8},
    "kv_window": {"sinks": 2, "window": 6},
    "skip_layers": {"layers": (1,)},
    "early_exit": {"first": 1, "threshold": 0.1},
    "skip_decode": {"end": 24, "share": 0.5},
}
FORMS = {  # of a pass, beside the one that has its name
    "kv_paged_int8": ("kv_paged", {"page": 8, "store": "int8"}),
    "kv_paged_int4": ("kv_paged", {"page": 16, "store": "int4", "group": 8, "residual": 8}),
}
WHOLE = ("kv_int4", "kv_window", "kv_paged", *FORMS)  # caches whose slots are not divided: on a context refused
LAYERS = {"skip_layers": 2, "early_exit": 2, "skip_decode": 2}  # of what is about layers; of the rest one tells
SHAPE = dict(num_layers=1, embed_dim=64, mlp_dim=128, num_heads=8, head_dim=16, windows=(), qkv_bias=True)


@functools.cache
def base(kind: str, layers: int = 1) -> Program:
    """Return a program of a layer or two; the dense one as it is loaded: fused projections, and too few key heads."""
    if kind == "experts":
        moe = tiny_moe(num_experts=8, expert_dim=32, layers=(0,))
        return random_program(tiny_config(**SHAPE, num_kv_heads=4, moe=moe))
    program = random_program(tiny_config(**{**SHAPE, "num_layers": layers}, num_kv_heads=2, tie_embeddings=False))
    model = apply_layouts(program.model, ("fused", "long_last"))
    return program.replace(model=model, layouts=("fused", "long_last"))


@functools.cache
def calibration(kind: str) -> Calibration:
    """Return text for the passes that look at one."""
    return Calibration.of(base(kind), (np.arange(64) * 7 % 96).tolist(), window=32)


@jax.jit
def run(model: Any, tokens: jax.Array, counts: jax.Array, keep: jax.Array) -> tuple[jax.Array, Any]:
    """Return the logits of chunk after chunk, the cache cut to keep[i] tokens before each, and the last cache."""

    def step(cache, fed):
        tokens, counts, keep = fed
        hidden, cache = model(tokens, cache.rewind(keep), counts)
        return cache, model.logits(hidden)

    cache, logits = jax.lax.scan(step, model.init_cache(BATCH, SLOTS), (tokens, counts, keep))
    return logits, cache


def logits(program: Program) -> tuple[np.ndarray, Any]:
    """Return the logits of a ragged text in six chunks, of which one takes the place of two before it."""
    tokens = (np.arange(6 * BATCH * CHUNK) * 11 % 96).reshape(6, BATCH, CHUNK).astype(np.int32)
    counts = np.full((6, BATCH), CHUNK, np.int32)
    counts[1], counts[4] = (16, 3, 0, 9), (1, 1, 1, 0)
    keep = np.full((6, BATCH), SLOTS, np.int32)
    keep[3] = 8
    found, cache = run(program.model, tokens, counts, keep)
    real = np.arange(CHUNK) < counts[:, :, None]
    return np.where(real[..., None], found, 0), cache


def on_meshes(kind: str, name: str, program: Program, meshes: Sequence[str], rules: str = DEFAULT) -> Iterator[dict]:
    """Yield a line a mesh: the largest and the median difference of logits, and how the arrays lie."""
    want, _ = logits(program)
    for mesh in meshes:
        placed = shard(mesh, rules)(program)
        got, cache = logits(placed)
        error = np.abs(got - want) / np.abs(want).max()
        held = [leaf for leaf in jax.tree.leaves(cache.layers) if leaf.ndim > 2]  # no table: heads don't divide one
        weights = {path: leaf for path, leaf in leaves(placed.model).items() if leaf.ndim > 1}
        yield {
            "kind": kind, "name": name, "mesh": mesh, "rules": rules,
            "largest": float(error.max()), "median": float(np.median(error)),
            "whole": [path for path, leaf in weights.items() if leaf.sharding.is_fully_replicated],
            "bytes": sum(leaf.nbytes for leaf in weights.values()),
            "device_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in weights.values()),
            "cache_bytes": sum(leaf.nbytes for leaf in held),
            "cache_device_bytes": sum(leaf.addressable_shards[0].data.nbytes for leaf in held),
        }  # fmt: skip


def decoders() -> Iterator[dict]:
    """Yield a line a decoder and mesh: whether the tokens are those of one device; and of perplexity and logits."""
    program = base("dense")
    paged = apply(program, ("kv_paged", OPTIONS["kv_paged"]))
    draft = random_program(tiny_config(num_layers=1, windows=(), num_heads=3, num_kv_heads=1), seed=5)
    rows = [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 3], [9] * 5, [4, 8, 15, 16, 23, 42]]
    sampled = dict(temperature=0.9, top_k=20, repetition_penalty=1.1)
    of = {
        "greedy": (program, {}),
        "sampled": (program, sampled),
        "ngram": (ji.speculative(program, adapt=False), {}),
        "lookahead": (ji.speculative(program, "lookahead", adapt=False), {}),
        "draft": (ji.speculative(program, draft, length=2, adapt=False), {}),
        "kv_paged": (paged, {}),
        "kv_paged lookahead": (ji.speculative(paged, "lookahead", adapt=False), {}),
        "kv_paged_int4 ngram": (ji.speculative(apply(program, FORMS["kv_paged_int4"]), adapt=False), {}),
    }
    ids = (np.arange(300) * 5 % 96).tolist()
    for name, (one, options) in of.items():
        want = ji.generate(one, rows, max_new_tokens=8, **options)
        for mesh in MESHES["dense"][:1] if options or name.startswith("kv_") else (*MESHES["dense"][:3], *CACHES):
            many = shard(mesh)(one)
            got = ji.generate(many, rows, max_new_tokens=8, **options)
            yield {"decoder": name, "mesh": mesh, "same": bool((got.tokens == want.tokens).all())}
    values = [ji.perplexity(p, ids, 64, batch_size=2) for p in (program, shard(MESHES["dense"][0])(program))]
    yield {"perplexity": values}


def compiled_step(model: Any, rows: int, tokens: int, slots: int) -> tuple[Any, Any]:
    """Return a step of a model on a mesh, compiled, and the shapes of its cache, which it changes in place."""
    cache = jax.eval_shape(lambda: model.init_cache(rows, slots))
    lies = cache_shardings(cache, model.mesh, model.rules)
    cache = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, lies)
    fed = [jax.ShapeDtypeStruct(shape, np.int32) for shape in ((rows, tokens), (rows,))]
    run = jax.jit(lambda model, *args: model(*args), donate_argnums=2)
    return run.lower(model, fed[0], cache, fed[1]).compile(), cache


def main() -> None:
    """Print lines of the passes, and of the decoders, that are named."""
    jax.config.update("jax_num_cpu_devices", 8)
    names = sys.argv[1:]
    for kind in MESHES:
        for name in (n for n in names if n not in ("decoders", "tables")):
            if kind == "experts" and name not in ("none", "int4", "w8a8"):
                continue
            spec = () if name == "none" else (FORMS.get(name, (name, OPTIONS.get(name, {}))),)
            program = apply(base(kind, LAYERS.get(name, 1)), *spec, calibration=calibration(kind))
            meshes = MESHES[kind]
            if kind == "dense" and (name == "none" or name.startswith("kv_")):
                meshes += CACHES
            if name in WHOLE:
                meshes = [mesh for mesh in meshes if "context" not in mesh]
            for line in on_meshes(kind, name, program, meshes):
                print(json.dumps(line), flush=True)
    if "tables" in names:
        for kind, rules, mesh in TABLES:
            for line in on_meshes(kind, "none", base(kind), (mesh,), rules):
                print(json.dumps(line), flush=True)
    if "decoders" in names:
        for line in decoders():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
