"""Running on eight simulated devices: in processes of their own, since JAX counts its devices once."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from jaxinfer.sharding.mesh import THREADS_EACH

ROOT = Path(__file__).resolve().parent.parent
# Quick to compile: what is asked is whether many devices compute what one does.
FLAGS = "--xla_backend_optimization_level=0"


@functools.cache
def lines(script: str, *arguments: str) -> list[dict]:
    """Return the lines of JSON that a script of this folder prints."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env["NPROC"] = str(8 * THREADS_EACH)  # as `simulate_devices` has it
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "not usable" not in done.stderr, done.stderr[-3000:]  # a cache that a step copies
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
