"""Run programs whose layers are in stages on eight simulated devices, and print how far each is from one device."""

import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mesh_laws import FORMS, OPTIONS, SHAPE, base, calibration, compiled_step, logits, on_meshes
from models import GOLDENS, random_program, tiny_config, tiny_moe

import jaxinfer as ji
from jaxinfer.decode.drafters.exit import Exit
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import abstract
from jaxinfer.passes import apply
from jaxinfer.passes.calibration import Calibration
from jaxinfer.plan import hlo
from jaxinfer.program import Program
from jaxinfer.session import Session
from jaxinfer.sharding.fitting import unfit
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.model import off_stages
from jaxinfer.sharding.rules import DEFAULT, RULES, Rules
from jaxinfer.sharding.shard import shard
from jaxinfer.sharding.specs import sharding_of
from jaxinfer.sharding.stages import pieces_of
from jaxinfer.tree import leaves

TWO, FOUR, CONTEXT = "data=2,stage=2,model=2", "stage=4,data=2", "stage=2,context=2,model=2"
LAWS = {  # passes, and the layers and meshes of each
    "none": (4, (TWO, FOUR, CONTEXT, "stage=2,fsdp=4")),
    "kv_int8": (2, (TWO, CONTEXT)),
    "kv_fp8": (2, (TWO,)),
    "kv_int4": (4, (TWO, FOUR)),
    "kv_window": (2, (TWO,)),
    "kv_paged": (4, (TWO, FOUR)),
    "kv_paged_int4": (2, (TWO,)),
    "int8": (2, (TWO,)),
    "w8a8": (2, (TWO,)),
    "quarot": (2, (TWO,)),
    "int4": (4, (TWO, FOUR)),
}
ROWS = [[5, 6, 7, 5, 6, 7, 5, 6], [1, 2, 3], [9] * 5, [4, 8, 15, 16, 23, 42]]


@functools.cache
def experts() -> Program:
    """Return a program of two layers, each a mixture of experts."""
    moe = tiny_moe(num_experts=8, expert_dim=32, layers=None)
    return random_program(tiny_config(**{**SHAPE, "num_layers": 2}, num_kv_heads=4, moe=moe))


def not_in_stages(program: Program, mesh: str) -> Program:
    """Return the program on the mesh with every layer on all stages, so that each device computes what it would there.

    What rounds its caches or activations may be a step off another mesh's, and the next layers make much of it.
    """
    rules = RULES[DEFAULT]
    return shard(mesh, Rules("whole", tuple(entry for entry in rules.table if entry[0] != "layers")))(program)


def with_pass(name: str, layers: int) -> Program:
    """Return the dense program of so many layers under a pass."""
    program, spec = base("dense", layers), FORMS.get(name, (name, OPTIONS.get(name, {})))
    return program if name == "none" else apply(program, spec, calibration=calibration("dense"))


def laws() -> Iterator[dict]:
    """Yield a line a pass and mesh, as `mesh_laws` does; of every table of rules, and of experts."""
    for name, (layers, meshes) in LAWS.items():
        program = with_pass(name, layers)
        for line in on_meshes("dense", name, program, meshes):
            if name in ("w8a8", "kv_fp8", "kv_int4", "kv_paged_int4"):
                one, _ = logits(not_in_stages(program, line["mesh"]))
                many, _ = logits(shard(line["mesh"])(program))
                line["same_mesh"] = float(np.abs(many - one).max() / np.abs(one).max())
            yield line
    yield from on_meshes("experts", "none", experts(), ("stage=2,expert=4", "stage=2,data=2,expert=2"))
    yield from on_meshes("dense", "none", base("dense", 2), ("data=2,stage=2,fsdp=2",), "fully_sharded")
    yield from on_meshes("dense", "none", base("dense", 2), ("stage=2,model=4",), "data")
    yield from on_meshes("experts", "none", experts(), ("stage=2,expert=4",), "expert")


def prompts() -> Iterator[dict]:
    """Yield a line of each text that is fed at once, in as many pieces as it is cut into, and of a step after it.

    One device has it whole; what rounds is held to the same pieces on the same mesh, so that both round alike.
    """

    @functools.partial(jax.jit, static_argnums=3)
    def run(model: Any, tokens: jax.Array, counts: jax.Array, pieces: int = 1) -> tuple[jax.Array, jax.Array]:
        cache, hidden, t = model.init_cache(len(tokens), 1024), [], tokens.shape[1] // pieces
        for i in range(pieces):
            y, cache = model(tokens[:, i * t : (i + 1) * t], cache, jnp.clip(counts - i * t, 0, t))
            hidden.append(y)
        after, _ = model(tokens[:, :1], cache, jnp.minimum(counts, 1))
        return model.logits(jnp.concatenate(hidden, axis=1)), model.logits(after)

    tokens = (np.arange(2 * 768) * 11 % 96).reshape(2, 768).astype(np.int32)
    counts = np.array([768, 301], np.int32)
    real = np.arange(768) < counts[:, None]
    for name, mesh in [("none", "stage=2,model=4"), ("none", CONTEXT), ("none", FOUR), ("kv_int4", "stage=2,model=4")]:
        program = with_pass(name, 2 if name == "kv_int4" else 4)
        many = shard(mesh)(program).model
        pieces = pieces_of(2, 768, many.mesh.shape, many.rules, True)
        one = (program.model, 1) if name == "none" else (not_in_stages(program, mesh).model, pieces)
        (want, after), (got, then) = run(one[0], tokens, counts, one[1]), run(many, tokens, counts)
        want, after, got, then = map(np.asarray, (want, after, got, then))
        error = np.where(real[..., None], np.abs(got - want), 0).max(), np.abs(then - after).max()
        yield {
            "name": name, "mesh": mesh, "pieces": pieces,
            "largest": [float(x / np.abs(want).max()) for x in error],
        }  # fmt: skip


def decoders() -> Iterator[dict]:
    """Yield whether tokens are those of one device: of generation, of drafts, of trees, of a session's branches."""
    program, two, draft = base("dense", 4), base("dense", 2), base("dense", 1)
    for name, one, options in [
        ("greedy", program, {}),
        ("sampled", two, dict(temperature=0.9, top_k=20, repetition_penalty=1.1)),
        ("ngram", ji.speculative(two, "ngram", adapt=False), {}),
        ("lookahead", ji.speculative(two, "lookahead", adapt=False), {}),
        ("draft", ji.speculative(program, two, length=2, adapt=False), {}),
        ("draft that is whole", ji.speculative(two, draft, length=2, adapt=False), {}),
        ("kv_int4", with_pass("kv_int4", 2), {}),
    ]:
        want = ji.generate(one, ROWS, max_new_tokens=8, **options)
        for mesh in (TWO, FOUR, CONTEXT) if name == "greedy" else (TWO,):
            got = ji.generate(shard(mesh)(one), ROWS, max_new_tokens=8, **options)
            yield {"decoder": name, "mesh": mesh, "same": bool((got.tokens == want.tokens).all())}
    for one in (two, with_pass("kv_paged", 2)):
        want = branches(one)
        yield {"decoder": "fork", "mesh": TWO, "same": branches(shard(TWO)(one)) == want, "tokens": want}


def branches(program: Program) -> list:
    """Return what branches of a session decode, and what the session decodes that one of them joins."""
    session, out = Session(program), []
    session.feed([ROWS[0]], room=32)
    branch = session.fork([[1, 2], [], [50] * 9, [3]], room=8)
    out += list(branch.decode(8))
    session.join(branch, branch.rows[0], room=8)
    return [[list(map(int, row)) for row in rows] for rows in (*out, *session.decode(8))]


def held() -> dict:
    """Return over how many devices arrays of layers and of a cache are divided, and which layers' a device has."""
    program = base("dense", 4)
    model = shard(TWO)(program).model
    cache = jax.jit(lambda model: model.init_cache(4, 64))(model)

    def parts(arrays: list) -> list[float]:
        return sorted({x.nbytes / x.addressable_shards[0].data.nbytes for x in arrays})

    arrays = jax.tree.leaves(model.layers)
    whose = []
    for place, node in enumerate(model.layers):
        for part in node.attention_norm.scale.addressable_shards:
            stage = int(np.argwhere(model.mesh.devices == part.device)[0][1])
            layer = program.model.layers[stage * len(model.layers) + place]
            whose.append(bool(np.array_equal(part.data, layer.attention_norm.scale)))
    return {
        "nodes": len(model.layers), "whose": whose,
        "matrices": parts([x for x in arrays if x.ndim > 2 or x.size > 2000]),
        "norms": parts([node.attention_norm.scale for node in model.layers]),
        "cache": parts(jax.tree.leaves(cache.layers)),
    }  # fmt: skip


def collectives(tokens: int, mesh: str) -> dict[str, Any]:
    """Return what a compiled step of many rows moves, as kinds, bytes and counts, and the bytes beside."""
    model = shard(mesh)(base("dense", 4)).model
    compiled, cache = compiled_step(model, 8, tokens, 4096)
    moved = hlo.read(compiled.as_text()).collectives
    return {
        "tokens": tokens, "mesh": mesh, "moved": sorted([c.kind, c.bytes, n] for c, n in moved.items()),
        "beside": compiled.memory_analysis().temp_size_in_bytes,
        "cache_array": min(4 * x.size // len(jax.devices()) for x in jax.tree.leaves(cache.layers)),
        "matrix": min(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(model.layers) if x.ndim > 2),
    }  # fmt: skip


def passes() -> Iterator[dict]:
    """Yield how far a program is whose passes were applied in its stages, from one device's."""
    ids = (np.arange(48) * 7 % 96).reshape(2, 24)
    for spec in ("int8", "quarot", "awq", "kv_int8"):
        one = base("dense", 4)
        many = shard(TWO)(one)
        text = [Calibration.of(p, (np.arange(64) * 7 % 96).tolist(), window=32) for p in (one, many)]
        one, many = (apply(p, spec, calibration=c) for p, c in zip((one, many), text, strict=True))
        error = np.abs(ji.logits(many, ids) - ji.logits(one, ids))
        yield {
            "pass": spec, "stages": many.model.stages, "passes": [name for name, _ in many.passes],
            "median": float(np.median(error)), "largest": float(error.max() / np.abs(ji.logits(one, ids)).max()),
        }  # fmt: skip


def same(program: Program, other: Program) -> bool:
    """Return whether two programs have the same arrays, each key head once, whatever lies where."""
    one, two = (leaves(unfit(off_stages(p.model))) for p in (program, other))
    return one.keys() == two.keys() and all(np.array_equal(one[p], two[p]) for p in one)


def files(scratch: Path) -> dict:
    """Return whether a checkpoint goes to its stages, and whether what is saved from there comes back elsewhere."""
    ids = (np.arange(24) * 7 % 64).reshape(2, 12)
    source = GOLDENS / "llama_mqa"
    plain = ji.apply(ji.load(source, dtype="float32"), "int8")
    loaded = ji.load(source, dtype="float32", mesh=TWO)
    shapes = abstract(plain.config)
    where = sharding_of(shapes, loaded.model.mesh, loaded.model.rules)
    matrices = [x for x in jax.tree.leaves(loaded.model.layers) if x.ndim > 2]
    program = ji.apply(loaded, "int8")
    path = ji.save(program, scratch / "stages")
    two = make_mesh({"stage": 2}, jax.devices()[:2])  # a device a stage
    others = [ji.load(path, mesh=mesh) for mesh in (None, "data=4,model=2", "stage=2,model=4", two)]
    back = ji.load(ji.save(plain, scratch / "alone"), mesh=TWO)
    return {
        "read_to": sorted({len(where(path, x).device_set) for path, x in leaves(shapes).items()}),
        "parts": sorted({x.nbytes / x.addressable_shards[0].data.nbytes for x in matrices}),
        "same": [same(program, other) for other in (*others, back)],
        "stages": [getattr(other.model, "stages", 1) for other in (program, *others, back)],
        "largest": max(float(np.abs(ji.logits(p, ids) - ji.logits(plain, ids)).max()) for p in (program, *others[1:])),
    }


def refusals() -> Iterator[dict]:
    """Yield what a program in stages says to what needs some of its layers."""
    many, exits = shard(TWO)(base("dense", 4)), ("early_exit", {"first": 2})
    asks = {
        "exit": lambda: ji.generate(ji.speculative(many, Exit(layers=1), adapt=False), ROWS, max_new_tokens=4),
        "direct": lambda: ji.passes.parse("int8")(many),
        "early_exit": lambda: shard(TWO)(apply(base("dense", 4), exits, calibration=calibration("dense"))),
        "skip_decode": lambda: shard(TWO)(apply(base("dense", 4), ("skip_decode", {"end": 24, "share": 0.5}))),
        "skip_layers": lambda: apply(many, ("skip_layers", {"layers": (1,)})),
    }  # fmt: skip
    for name, ask in asks.items():
        try:
            ask()
        except InputError as error:
            yield {"refused": name, "said": str(error)}


def main() -> None:
    """Print lines of what is named."""
    jax.config.update("jax_num_cpu_devices", 8)
    for name in sys.argv[1:]:
        if name in ("laws", "prompts", "decoders", "passes", "refusals"):
            found = {"laws": laws, "prompts": prompts, "decoders": decoders, "passes": passes, "refusals": refusals}
            for line in found[name]():
                print(json.dumps(line), flush=True)
        elif name == "held":
            print(json.dumps(held()))
            for tokens, mesh in ((1, TWO), (1, FOUR), (256, "stage=2,model=4")):
                print(json.dumps(collectives(tokens, mesh)), flush=True)
        else:
            print(json.dumps(files(Path(name))), flush=True)


if __name__ == "__main__":
    main()
