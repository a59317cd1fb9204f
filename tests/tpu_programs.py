"""Compile whole programs for a TPU that is not there, and print which kernels they hold."""

import collections
import json
import re

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import Attention, random
from jaxinfer.passes import apply
from jaxinfer.program import Program
from jaxinfer.tree import select
from pallas_kernels import chips, compat

CONFIG = ModelConfig(
    family="llama", vocab_size=512, embed_dim=256, mlp_dim=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
    max_context=512, tie_embeddings=False,
)  # fmt: skip
PAGED_INT4 = ("kv_paged", {"store": "int4", "group": 64, "page": 128})
LOOPS = {
    "dense": (), "kv_int8": ("kv_int8",), "kv_int4": (("kv_int4", {"group": 64}),), "kv_paged": ("kv_paged",),
    "kv_paged_int4": (PAGED_INT4,),
}  # fmt: skip
PROGRAMS = [
    ("decode", 1, "bfloat16", ()),
    ("decode_float32", 1, "float32", ()),
    ("prefill", 64, "bfloat16", ()),
    ("decode_kv_int8", 1, "bfloat16", ("kv_int8",)),
    ("decode_kv_fp8", 1, "bfloat16", ("kv_fp8",)),
    ("decode_kv_int4", 1, "bfloat16", (("kv_int4", {"group": 64}),)),
    ("verify_kv_int4", 4, "bfloat16", (("kv_int4", {"group": 64}),)),
    ("prefill_kv_int4", 64, "bfloat16", (("kv_int4", {"group": 64}),)),
    ("decode_kv_paged", 1, "bfloat16", ("kv_paged",)),
    ("decode_kv_paged_int4", 1, "bfloat16", (PAGED_INT4,)),
    ("verify_kv_paged_int4", 4, "bfloat16", (PAGED_INT4,)),
    ("prefill_kv_paged_int4", 64, "bfloat16", (PAGED_INT4,)),
    ("decode_kv_int4_of_32", 1, "bfloat16", ("kv_int4",)),
    ("prefill_kv_int8", 64, "bfloat16", ("kv_int8",)),
    ("decode_int8", 1, "bfloat16", ("int8",)),
    ("decode_int4", 1, "bfloat16", ("int4",)),
    ("decode_w8a8", 1, "bfloat16", ("w8a8",)),
]


def kernels(program: Program, tokens: int, chip: str | None) -> dict[str, int]:
    """Return how often each kernel is called by a step of `tokens` tokens, compiled for a TPU v5e."""
    one = SingleDeviceSharding(compat.topology_device("v5e:2x2"))
    model = program.model
    cache = jax.eval_shape(lambda: model.init_cache(2, 256))

    def step(model, tokens, cache):
        hidden, cache = model(tokens, cache)
        return model.logits(hidden), cache

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        (model, jnp.zeros((2, tokens), jnp.int32), cache),
    )
    if chip is None:
        lowered = jax.jit(step).lower(*shapes)
    else:
        with chips.assume(chip):
            lowered = jax.jit(step).lower(*shapes)
    names = re.findall(r"%(\w+?)(?:\.\d+)* = .*custom_call_target=\"tpu_custom_call\"", lowered.compile().as_text())
    return dict(collections.Counter(names))


def copies_in_a_loop(program: Program, batch: int, tokens: int) -> list[str]:
    """Return the copies of whole cache arrays that a loop of appends and attentions makes, compiled for a TPU v5e."""
    one = SingleDeviceSharding(compat.topology_device("v5e:2x2"))
    node = next(iter(select(program.model, Attention).values()))
    K, N, H = CONFIG.num_kv_heads, CONFIG.num_heads, CONFIG.head_dim
    cache = jax.eval_shape(lambda: node.cache.create(batch, 4096, K, H, jnp.bfloat16))

    def loop(cache, q, k, v, start):
        def step(i, carry):
            cache, out = carry
            cache = cache.append(k, v, start + i, jnp.full(batch, tokens))
            positions = (start + i)[:, None] + jnp.arange(tokens)
            out, cache = cache.attend(q + out, positions, scale=0.1, window=None, softcap=None)
            return cache, out

        return jax.lax.fori_loop(0, 10, step, (cache, jnp.zeros_like(q)))

    shapes = (cache, *(jnp.zeros((batch, tokens, n, H), jnp.bfloat16) for n in (N, K, K)), jnp.zeros(batch, jnp.int32))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), shapes)
    with chips.assume("v5e"):
        text = jax.jit(loop, donate_argnums=0).lower(*shapes).compile().as_text()
    assert "tpu_custom_call" in text
    large = {",".join(map(str, x.shape)) for x in jax.tree.leaves(cache) if x.size > batch * 1024 * K * H}
    return [shape for shape, _ in re.findall(r"= \w+\[([\d,]+)\]\S* (copy|transpose)\(", text) if shape in large]


def main() -> None:
    """Print a line a program."""
    base = {dtype: Program(random(CONFIG, dtype=jnp.dtype(dtype))) for dtype in ("bfloat16", "float32")}
    for name, tokens, dtype, passes in PROGRAMS:
        program = apply(base[dtype], *passes)
        print(json.dumps({"program": name, "kernels": kernels(program, tokens, "v5e")}), flush=True)
    for name, passes in LOOPS.items():
        program = apply(base["float32"], *passes)
        for batch, tokens in ((1, 1), (4, 1), (4, 4)):
            found = copies_in_a_loop(program, batch, tokens)
            print(json.dumps({"program": f"loop_{name}_{batch}_{tokens}", "copies": found}), flush=True)
    print(json.dumps({"program": "xla", "kernels": kernels(base["bfloat16"], 1, None)}), flush=True)


if __name__ == "__main__":
    main()
