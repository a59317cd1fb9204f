"""Which dtype and weight layout this device runs fastest, found by a short measurement that is made once and kept."""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import platform
import time

import jax
import jax.numpy as jnp

from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import random
from jaxinfer.passes.layout import LAYOUTS
from jaxinfer.paths import cache_dir

# Four layers of a small model: large enough that its weights do not stay in a core's cache, and a second to run.
_PROBE = ModelConfig(
    family="probe", vocab_size=256, embed_dim=768, mlp_dim=2048, num_layers=4, num_heads=12, num_kv_heads=4,
    head_dim=64, max_context=512,
)  # fmt: skip
_PROMPT, _STEPS = 256, 24  # tokens of one timed prefill, steps of one timed decode
_WORKLOAD = (512, 128)  # prompt and new tokens by whose predicted time variants are compared
_WORTH = 1.25  # how much faster a less precise dtype must be to be chosen unasked
_LAYOUT_CHOICES = tuple(c for n in range(len(LAYOUTS) + 1) for c in itertools.combinations(LAYOUTS, n))


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One variant on the probe model: seconds a token."""

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
        lines = ["   dtype     layout                prefill tok/s  decode tok/s  (probe of 4 layers, batch 1)"]
        for m in self.measurements:
            mark = "->" if (m.dtype, m.layouts) == (self.dtype.name, self.layouts) else "  "
            layout = "+".join(m.layouts) or "separate"
            lines.append(f"{mark} {m.dtype:9s} {layout:22s} {1 / m.prefill:12.0f} {1 / m.decode:13.0f}")
        return lines


def choose(dtype: jnp.dtype | None = None) -> Choice:
    """Return the fastest layout on this device for `dtype`; without one, choose the dtype too.

    float32 is kept unless bfloat16 runs the reference workload 1.25 times as fast, so that noise does not decide
    over precision. float16 takes bfloat16's layout.
    """
    measurements = measure()
    fastest = {
        d: min((m for m in measurements if m.dtype == d), key=lambda m: m.workload) for d in ("float32", "bfloat16")
    }
    if dtype is None:
        gain = fastest["float32"].workload / fastest["bfloat16"].workload
        dtype = jnp.dtype(jnp.bfloat16 if gain >= _WORTH else jnp.float32)
    best = fastest["float32" if dtype == jnp.float32 else "bfloat16"]
    return Choice(jnp.dtype(dtype), best.layouts, measurements)


@functools.cache
def measure() -> tuple[Measurement, ...]:
    """Return the measurements of this device, from the cache directory if they were made before."""
    path = cache_dir() / f"device-{_fingerprint()}.json"
    try:
        rows = json.loads(path.read_text())
        return tuple(Measurement(**{**row, "layouts": tuple(row["layouts"])}) for row in rows)
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or not readable: measure
    measurements = _measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps([dataclasses.asdict(m) for m in measurements], indent=1))
        os.replace(scratch, path)
    except OSError:
        pass  # a read-only home only means measuring again
    return measurements


def _measure() -> tuple[Measurement, ...]:
    runs = {}
    for dtype in ("float32", "bfloat16"):
        for layouts in _LAYOUT_CHOICES:
            model = random(_PROBE, dtype=jnp.dtype(dtype))
            for layout in layouts:
                model = LAYOUTS[layout](model)
            runs[dtype, layouts] = model
    times = {key: ([], []) for key in runs}
    for round_ in range(4):  # alternating, so that a busy moment does not fall on one variant
        for key, model in runs.items():
            for kind, fn in enumerate((_prefill, _decode)):
                begin = time.perf_counter()
                fn(model).block_until_ready()
                if round_:  # the first round compiles
                    times[key][kind].append(time.perf_counter() - begin)
    return tuple(
        Measurement(dtype, layouts, prefill=min(prefill) / _PROMPT, decode=min(decode) / _STEPS)
        for (dtype, layouts), (prefill, decode) in times.items()
    )


@jax.jit
def _prefill(model):
    return model(jnp.ones((1, _PROMPT), jnp.int32), model.init_cache(1, _PROMPT))[0]


@jax.jit
def _decode(model):
    def step(_, carry):
        x, cache = carry
        hidden, cache = model(x, cache)
        return (hidden[..., 0] > 0).astype(jnp.int32), cache

    x = jnp.ones((1, 1), jnp.int32)
    return jax.lax.fori_loop(0, _STEPS, step, (x, model.init_cache(1, 128)))[0]


def _fingerprint() -> str:
    """Return a key for what the measurement depends on: device, cores, JAX, and this file's probe."""
    parts = (
        jax.devices()[0].device_kind, _processor(), os.cpu_count(), jax.__version__, _PROBE, _LAYOUT_CHOICES,
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the processor's model and features: machines that share a home directory may differ in both."""
    try:
        with open("/proc/cpuinfo") as f:
            return "".join(sorted({line for line in f if line.startswith(("model", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
