"""Run a model with a sliding window on eight simulated devices, four of which divide its context; print how far it is.

A device has 32 slots of 128, so that texts of 100 tokens lie on four, and windows of 24 tokens on one or two.
"""

import functools
import json
from typing import Any

import jax
import numpy as np
from mesh_laws import compiled_step
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.errors import InputError
from jaxinfer.passes import apply
from jaxinfer.passes.depth.mixture_of_depths import with_mixture_of_depths
from jaxinfer.plan import hlo
from jaxinfer.program import Program
from jaxinfer.session import Session
from jaxinfer.sharding.shard import shard

MESH, BATCH, SLOTS, TOKENS = "context=4,model=2", 2, 128, 104
COUNTS = (104, 61)
PIECES = {"prompt": [104], "sevens": [7] * 15, "steps": [1] * 104, "halves": [64, 40]}  # of seven all devices have all


@functools.cache
def base(name: str) -> Program:
    """Return a program of two layers, of which the first has a window."""
    sizes = dict(embed_dim=64, mlp_dim=128, num_heads=8, num_kv_heads=4, head_dim=16, attention_softcap=20.0)
    return apply(random_program(tiny_config(**sizes)), *(() if name == "none" else (name,)))


@jax.jit
def step(model: Any, cache: Any, tokens: jax.Array, counts: jax.Array) -> tuple[jax.Array, Any]:
    """Return the logits of a chunk and the longer cache."""
    hidden, cache = model(tokens, cache, counts)
    return model.logits(hidden), cache


def logits(program: Program, pieces: list[int]) -> np.ndarray:
    """Return the logits of two rows, the second of which is shorter, fed in pieces; zeros where it has ended."""
    tokens = (np.arange(BATCH * TOKENS) * 11 % 96).reshape(BATCH, TOKENS).astype(np.int32)
    cache, out, at = jax.jit(lambda model: model.init_cache(BATCH, SLOTS))(program.model), [], 0
    for size in pieces:
        fed = np.zeros((BATCH, size), np.int32)
        part = tokens[:, at : at + size]
        fed[:, : part.shape[1]] = part
        found, cache = step(program.model, cache, fed, np.clip(np.array(COUNTS) - at, 0, part.shape[1]))
        out.append(np.asarray(found)[:, : part.shape[1]])
        at += size
    real = np.arange(TOKENS) < np.array(COUNTS)[:, None]
    return np.where(real[..., None], np.concatenate(out, axis=1), 0)


def talk(program: Program) -> list[list[int]]:
    """Return what a session decodes over the devices' bounds: of a prompt, of more, and of one that it goes back to."""
    session, out = Session(program), []
    text = (np.arange(200) * 7 % 96).tolist()
    for prompt in (text[:120], text[:180], [*text[:50], 9, 8, 7]):
        session.feed([prompt], room=20)
        out.append([token for rows in session.decode(20) for token in rows[0]])
    return out


def collectives(program: Program, tokens: int) -> dict[str, Any]:
    """Return what a compiled step of many rows moves, as kinds, bytes and counts, and its FLOPs."""
    compiled, cache = compiled_step(shard(MESH)(program).model, 8, tokens, 1024)
    found = hlo.read(compiled.as_text()).collectives
    return {
        "tokens": tokens, "moved": [[c.kind, c.bytes, n] for c, n in found.items()],
        "flops": compiled.cost_analysis()["flops"],
        "layer_bytes": sum(x.nbytes for x in jax.tree.leaves(jax.tree.map(_shard, cache.layers[1]))),
    }  # fmt: skip


def _shard(x: Any) -> Any:
    return np.empty(x.sharding.shard_shape(x.shape), x.dtype)


def main() -> None:
    """Print a line of each text, of each session, and of each compiled program."""
    jax.config.update("jax_num_cpu_devices", 8)
    for name in ("none", "kv_int8"):
        want = logits(base(name), [TOKENS])
        for how, pieces in list(PIECES.items())[: 4 if name == "none" else 1]:
            got = logits(shard(MESH)(base(name)), pieces)
            error = np.abs(got - want).max() / np.abs(want).max()
            print(json.dumps({"name": name, "pieces": how, "largest": float(error)}), flush=True)
    one, drafted = base("none"), ji.speculative(base("none"), length=3, adapt=False)
    want = talk(one)
    for decoder, program in {"greedy": one, "ngram": drafted}.items():
        got = talk(shard(MESH)(program))
        print(
            json.dumps({"decoder": decoder, "same": got == want, "tokens": [len(set(row)) for row in want]}), flush=True
        )
    mixed = shard(MESH)(Program(with_mixture_of_depths(base("none").model))).model
    try:
        mixed.init_cache(BATCH, SLOTS)
    except InputError as error:
        print(json.dumps({"refused": str(error)}), flush=True)
    for tokens in (1, 64):
        print(json.dumps(collectives(base("none"), tokens)), flush=True)


if __name__ == "__main__":
    main()
