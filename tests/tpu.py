"""Compiling for TPUs that are not there, in processes of their own: libtpu reads its environment once."""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import aot

ROOT = Path(__file__).resolve().parent.parent
LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(not LIBTPU, reason='needs libtpu: pip install -e ".[test]" on Linux x86-64')


@functools.cache
def lines(*command: str) -> list[dict[str, Any]]:
    """Return the lines of JSON that a Python command prints."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=aot.environment(), capture_output=True, text=True, timeout=1200
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and found, done.stderr[-2000:]
    return found
