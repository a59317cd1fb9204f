"""How much of what the device could do a program uses: bytes against memory bandwidth, FLOPs against the peak."""

import dataclasses
import functools
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import DTypeLike

from jaxinfer import tree
from jaxinfer.eval.size import CacheCost, buffer_bytes
from jaxinfer.models.moe import MoE
from jaxinfer.models.transformer import abstract
from jaxinfer.program import Program

# Published dense peaks of one JAX device: bytes/s, FLOP/s in 16-bit floats, FLOP/s of a float32 product at JAX's
# default precision, which is TF32 on these GPUs and one bfloat16 pass on a TPU. The first match of the kind wins.
_PUBLISHED = (
    # NVIDIA's data sheets of the H100, H200 and A100; their "with sparsity" figures halved.
    (r"NVIDIA H100 PCIe", 2.0e12, 756e12, 378e12),
    (r"NVIDIA H100 80GB HBM3", 3.35e12, 989e12, 494e12),
    (r"NVIDIA H200.*", 4.8e12, 989e12, 494e12),
    (r"NVIDIA A100-SXM4-80GB", 2.039e12, 312e12, 156e12),
    (r"NVIDIA A100-SXM4-40GB", 1.555e12, 312e12, 156e12),
    (r"NVIDIA A100 80GB PCIe", 1.935e12, 312e12, 156e12),
    # cloud.google.com/tpu/docs, the pages v5e, v5p, v6e and tpu7x; a TPU7x chip is two JAX devices.
    (r"TPU v5 ?(e|lite)", 0.819e12, 197e12, 197e12),
    (r"TPU v5p?", 2.765e12, 459e12, 459e12),
    (r"TPU v6 ?(e|lite)", 1.64e12, 918e12, 918e12),
    (r"TPU ?7x?", 3.69e12, 1154e12, 1154e12),
)
_ARRAY = 1 << 28  # bytes that a bandwidth measurement reads: far more than a processor's cache
_SIDE = 2048  # of the square matrices that a FLOP/s measurement multiplies
_REPEATS = 7


@dataclasses.dataclass(frozen=True)
class Machine:
    """What one device can do at most."""

    kind: str
    bandwidth: float  # bytes/s that it reads from memory
    flops: float  # FLOP/s of matrix products of `dtype`
    dtype: str
    source: str  # "published" or "measured"

    def describe(self) -> str:
        """Return one line for people."""
        rates = f"{self.bandwidth / 1e9:.0f} GB/s, {self.flops / 1e12:.4g} TFLOP/s in {self.dtype}"
        return f"{self.kind}: {rates} ({self.source})"


def device_name() -> str:
    """Return how many devices of which kind JAX runs on; of a CPU, the processor's name and cores."""
    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or kind}"


@functools.cache
def machine(dtype: str = "float32") -> Machine:
    """Return the limits of the default device for products of `dtype`: published ones, or else measured here, once."""
    kind = jax.devices()[0].device_kind
    for pattern, bandwidth, half, single in _PUBLISHED:
        if re.fullmatch(pattern, kind):
            return Machine(kind, bandwidth, single if dtype == "float32" else half, dtype, "published")
    return Machine(kind, _read_rate(), _product_rate(jnp.dtype(dtype)), dtype, "measured")


def decode_bytes(program: Program, cache: CacheCost, tokens: float | int, rows: int = 1) -> float:
    """Return the bytes that a decode step must read: weights, and `rows` caches that hold `tokens` tokens each.

    An embedding table that only looks tokens up is not read, nor are experts that no token of the step chose (as many
    are counted as `rows` tokens can choose), nor tokens outside a layer's window.
    """
    model = program.model
    weights = buffer_bytes(model)
    if model.unembed is not None:
        weights -= buffer_bytes(model.embed)
    for node in tree.select(model, MoE).values():
        idle = 1 - min(1.0, rows * node.experts_per_token / node.gate.kernel.shape[0])
        weights -= idle * buffer_bytes([node.gate, node.up, node.down])
    kv = 0.0
    for i, (fixed, per_token) in enumerate(zip(cache.fixed, cache.per_token, strict=True)):
        window = program.config.window(i)
        kv += fixed + per_token * (tokens if window is None else min(tokens, window))
    return weights + rows * kv


def prefill_flops(program: Program, tokens: int) -> float:
    """Return the FLOPs of a prompt of `tokens` and its last token's logits, by the architecture and not by the passes.

    `2 * matrix entries * tokens + 4 * N * H * (query, key) pairs in sight`; of experts only those that a token runs.
    """
    c, layers = program.config, len(program.model.layers) * getattr(program.model, "stages", 1)
    model = abstract(c)
    entries = sum(leaf.size for leaf in jax.tree.leaves(model.layers) if len(leaf.shape) > 1)
    for node in tree.select(model, MoE).values():
        size = sum(leaf.size for leaf in jax.tree.leaves([node.gate, node.up, node.down]))
        entries -= size * (1 - c.moe.experts_per_token / c.moe.num_experts)
    pairs = sum(_pairs(tokens, c.window(i)) for i in range(c.num_layers))
    body = 2 * entries * tokens + 4 * c.num_heads * c.head_dim * pairs
    return body * layers / c.num_layers + 2 * c.vocab_size * c.embed_dim


def _pairs(tokens: int, window: int | None) -> int:
    """Return how many (query, key) pairs causal attention sees."""
    full = tokens if window is None else min(tokens, window)
    return full * (full + 1) // 2 + (tokens - full) * full


def _read_rate() -> float:
    x = jnp.ones(_ARRAY // 4, jnp.float32)
    return x.nbytes / _fastest(jax.jit(jnp.sum), x)


def _product_rate(dtype: DTypeLike) -> float:
    x = jnp.ones((_SIDE, _SIDE), dtype)
    return 2 * _SIDE**3 / _fastest(jax.jit(jnp.matmul), x, x)


def _fastest(fn: Callable, *args: jax.Array) -> float:
    """Return the seconds of the fastest call after the first, which compiles."""
    seconds = []
    for _ in range(_REPEATS + 1):
        begin = time.perf_counter()
        fn(*args).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])
