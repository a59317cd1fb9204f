"""What this machine is, as a key: what is measured once is kept under it."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from typing import Any

import jax

from jaxinfer.paths import cache_dir


def kept(name: str, about: object, measure: Callable[[], Any]) -> Any:
    """Return what `measure()` gave, as JSON, when it last ran on this device, with this JAX, for the same `about`.

    It is kept in the cache directory as NAME-KEY.json; where that can't be written it is measured again next time.
    """
    parts = (jax.devices()[0].device_kind, _processor(), os.cpu_count(), jax.__version__, about)
    path = cache_dir() / f"{name}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        pass  # not there, or not readable: measure
    found = measure()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(found, indent=1))
        os.replace(scratch, path)
    except OSError:
        pass  # a read-only home only means measuring again
    return found


def _processor() -> str:
    """Return the processor's model and features: machines that share a home directory may differ in both."""
    try:
        with open("/proc/cpuinfo") as f:
            return "".join(sorted({line for line in f if line.startswith(("model", "flags", "Features"))}))
    except OSError:
        return platform.processor() + platform.machine()
