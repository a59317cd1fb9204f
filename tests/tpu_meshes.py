"""Compile whole programs for a mesh of TPUs that are not there: which kernels they hold, and what is moved."""

import collections
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tpu_programs import CONFIG, PAGED_INT4

from jaxinfer.decode import loop
from jaxinfer.decode.sampling import Sampling
from jaxinfer.models.transformer import abstract
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.sharding.mesh import make_mesh
from jaxinfer.sharding.rules import RULES
from jaxinfer.sharding.shard import put_leaf, shard
from jaxinfer.sharding.specs import cache_shardings
from pallas_kernels import compat

MESH = {"data": 2, "model": 2}
CONTEXT = {"context": 2, "model": 2}
STAGES = {"stage": 2, "model": 2}
PROGRAMS = {
    "decode": ((), 1),
    "decode_int8_kv_int8": (("int8", "kv_int8"), 1),
    "decode_int4_kv_int4": ((("int4", {"group": 64}), ("kv_int4", {"group": 64})), 1),
    "decode_w8a8": (("w8a8",), 1),
    "decode_kv_paged": (("kv_paged",), 1),
    "decode_kv_paged_int4": ((PAGED_INT4,), 1),
    "prefill": ((), 64),
    "context_decode": ((), 1, CONTEXT),
    "context_decode_int8_kv_int8": (("int8", "kv_int8"), 1, CONTEXT),
    "context_prefill": (("int8",), 64, CONTEXT),
    "stage_decode_int8_kv_int8": (("int8", "kv_int8"), 1, STAGES),
    "stage_decode_kv_paged": (("kv_paged",), 1, STAGES),
    "stage_prefill": ((), 256, STAGES),
}
BATCH, SLOTS = 4, 512


def compiled(passes: tuple, tokens: int, sizes: dict[str, int] = MESH) -> str:
    """Return the compiled decode loop of a program on four chips of a v5e, or its prefill of many tokens."""
    mesh, rules = make_mesh(sizes, compat.topology_devices("v5e:2x2")), RULES["mixed"]
    program = shard(mesh, rules)(apply(Program(abstract(CONFIG, jnp.bfloat16)), *passes))
    cache = jax.eval_shape(lambda model: model.init_cache(BATCH, SLOTS), program.model)
    cache = jax.tree.map(put_leaf, cache, cache_shardings(cache, mesh, rules))

    def whole(shape: tuple[int, ...], dtype: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    if tokens > 1:
        step = jax.jit(lambda model, tokens, cache: model(tokens, cache), donate_argnums=2)
        return step.lower(program.model, whole((BATCH, tokens), "int32"), cache).compile().as_text()
    logits = whole((BATCH, CONFIG.vocab_size), "float32")
    fields = dict(limit=np.full(BATCH, 20), stop_ids=[], sampling=Sampling(), seeds=np.arange(BATCH), seen=None)
    state = jax.eval_shape(lambda c, x: loop.start(program.decoder, c, x, **fields), cache, logits)
    state = jax.tree.map(lambda x: whole(x.shape, x.dtype), state).replace(cache=cache)
    return loop.advance.lower(program.decoder, program.model, state, whole((), "int32")).compile().as_text()


def moved(text: str) -> dict[str, list[str]]:
    """Return the shapes of what each kind of collective gives."""
    found = collections.defaultdict(list)
    kinds = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for shape, kind in re.findall(kinds, text):
        found[kind].append(re.sub(r"\{[^}]*\}", "", shape))
    return dict(found)


def main() -> None:
    """Print a line a program."""
    for name in sys.argv[1:] or PROGRAMS:
        text = compiled(*PROGRAMS[name])
        calls = re.findall(r"%(\w+?)(?:\.\d+)* = .*custom_call_target=\"tpu_custom_call\"", text)
        line = {"program": name, "kernels": dict(collections.Counter(calls)), "moved": moved(text)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
