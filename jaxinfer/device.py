"""Which dtype and weight layout this device runs fastest, found by a short measurement that is made once and kept."""

import dataclasses
import functools
import itertools
import math
import sys
import time

import jax
import jax.numpy as jnp

from jaxinfer.machine import kept
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import abstract, build
from jaxinfer.passes.layout import LAYOUTS, apply_layouts

_WIDEST = 2048  # wider models are measured at this width: past it the best layout no longer changes
_PROBE_BYTES = 64e6  # of bfloat16 weights: more than a processor's cache, or the memory would not be measured
_PROMPT, _STEPS = 128, 8  # tokens of one timed prefill, steps of one timed decode
_WORKLOAD = (512, 128)  # prompt and new tokens by whose predicted time variants are compared
# How much faster a variant must be to be chosen, so that noise decides over neither precision nor layout. The probe is
# matrix products alone, which flatters bfloat16 on a CPU: there its attention and elementwise work is slower than
# float32's, and a whole decode step with products 1.3 times as fast was 0.8 times as fast.
_WORTH_PRECISION = {"cpu": 2.0}  # bfloat16 against float32
_WORTH_PRECISION_ELSEWHERE = 1.25
_WORTH_LAYOUT = 1.1  # any layout against the usual one
_USUAL = ("fused", "long_last")
_LAYOUT_CHOICES = tuple(c for n in range(len(LAYOUTS) + 1) for c in itertools.combinations(LAYOUTS, n))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One variant on the probe: seconds a token of its matrix products."""

    dtype: str
    layouts: tuple[str, ...]
    prefill: float
    decode: float

    @property
    def workload(self) -> float:
        """Seconds that the reference workload would take."""
        return _WORKLOAD[0] * self.prefill + _WORKLOAD[1] * self.decode


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a model is loaded as, and the measurements that say so."""

    dtype: jnp.dtype
    layouts: tuple[str, ...]
    measurements: tuple[Measurement, ...]

    def describe(self) -> list[str]:
        """Return the lines of a small table: every variant's speed on the probe, the chosen one marked."""
        if not self.measurements:
            return [
                f"-> {self.dtype.name:9s} {'+'.join(self.layouts):22s} not measured: the model is too small to tell"
            ]
        lines = [
            "   dtype     layout                 prefill us/token  decode us/token  (matrix products of the probe)"
        ]
        for m in self.measurements:
            mark = "->" if (m.dtype, m.layouts) == (self.dtype.name, self.layouts) else "  "
            layout = "+".join(m.layouts) or "separate"
            lines.append(f"{mark} {m.dtype:9s} {layout:22s} {1e6 * m.prefill:16.0f} {1e6 * m.decode:16.0f}")
        return lines


def choose(config: ModelConfig, dtype: jnp.dtype | None = None) -> Choice:
    """Return the fastest weight layout on this device for a model's shapes in `dtype`; without one, choose it too.

    float32 is kept unless bfloat16 is 1.25 times as fast on the reference workload (on a CPU 2 times), and the usual
    layout unless another is 1.1 times as fast. float16 takes bfloat16's layout. A model that fits a processor's cache
    is not measured: it is float32 in the usual layout.
    """
    probe = _probe_config(config)
    if probe.num_layers > config.num_layers:
        return Choice(jnp.dtype(jnp.float32 if dtype is None else dtype), _USUAL, ())
    measurements = measure(probe)
    return Choice(*_decide(measurements, dtype), measurements)


def _decide(measurements: tuple[Measurement, ...], dtype: jnp.dtype | None) -> tuple[jnp.dtype, tuple[str, ...]]:
    best = {d: _best([m for m in measurements if m.dtype == d]) for d in ("float32", "bfloat16")}
    if dtype is None:
        gain = best["float32"].workload / best["bfloat16"].workload
        worth = _WORTH_PRECISION.get(jax.default_backend(), _WORTH_PRECISION_ELSEWHERE)
        dtype = jnp.dtype(jnp.bfloat16 if gain >= worth else jnp.float32)
    return jnp.dtype(dtype), best["float32" if dtype == jnp.float32 else "bfloat16"].layouts


def _best(measurements: list[Measurement]) -> Measurement:
    """Return the usual layout's measurement, or the fastest one where that is clearly faster."""
    fastest = min(measurements, key=lambda m: m.workload)
    usual = next(m for m in measurements if m.layouts == _USUAL)
    return fastest if usual.workload / fastest.workload >= _WORTH_LAYOUT else usual


def _probe_config(config: ModelConfig) -> ModelConfig:
    """Return a model with the layer shapes of `config`, narrowed if it is wide, and only so many layers."""
    shrink = max(1.0, config.embed_dim / _WIDEST)
    kv_heads = max(1, round(config.num_kv_heads / shrink))
    small = ModelConfig(
        family="probe",
        vocab_size=16,
        embed_dim=round(config.embed_dim / shrink),
        mlp_dim=round(config.mlp_dim / shrink),
        num_layers=1,
        num_heads=kv_heads * (config.num_heads // config.num_kv_heads),
        num_kv_heads=kv_heads,
        head_dim=config.head_dim,
        max_context=_PROMPT,
    )
    layer = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(small).layers))
    return dataclasses.replace(small, num_layers=max(1, math.ceil(_PROBE_BYTES / 2 / layer)))


@functools.cache
def measure(probe: ModelConfig) -> tuple[Measurement, ...]:
    """Return the measurements of `probe` on this device, from the cache directory if they were made before."""
    about = (probe, _LAYOUT_CHOICES)
    rows = kept("device", about, lambda: [dataclasses.asdict(m) for m in _measure(probe)])
    return tuple(Measurement(**{**row, "layouts": tuple(row["layouts"])}) for row in rows)


def _measure(probe: ModelConfig) -> tuple[Measurement, ...]:
    print("measuring which weight layout this device runs fastest, once ...", file=sys.stderr, flush=True)
    variants = {}
    for dtype in ("float32", "bfloat16"):
        for layouts in _LAYOUT_CHOICES:
            model = build(probe, lambda shape, dtype: jnp.full(shape, 0.01, dtype), jnp.dtype(dtype))
            variants[dtype, layouts] = apply_layouts(model, layouts)
    times = {key: ([], []) for key in variants}
    for round_ in range(4):  # alternating, so that a busy moment does not fall on one variant
        for key, model in variants.items():
            for kind, (rows, steps) in enumerate(((_PROMPT, 1), (1, _STEPS))):
                x = jnp.ones((1, rows, probe.embed_dim), key[0])
                begin = time.perf_counter()
                _products(model.layers, x, steps).block_until_ready()
                if round_:  # the first round compiles
                    times[key][kind].append(time.perf_counter() - begin)
    return tuple(
        Measurement(dtype, layouts, prefill=min(prefill) / _PROMPT, decode=min(decode) / _STEPS)
        for (dtype, layouts), (prefill, decode) in times.items()
    )


@functools.partial(jax.jit, static_argnums=2)
def _products(layers, x, steps):
    """Run every matrix product of the layers `steps` times, each on the result of the one before, and little else."""

    def step(_, x):
        for block in layers:
            q, k, v = block.attention.qkv(x)
            x = jnp.tanh(x + block.attention.o(q) + (k + v).mean())
            x = jnp.tanh(x + block.mlp(x))
        return x

    return jax.lax.fori_loop(0, steps, step, x)
