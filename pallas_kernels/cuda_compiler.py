"""jax's compiler for NVIDIA's GPUs, which needs neither a GPU nor a driver: where it is, and how it comes here.

It is kept apart from the packages of this Python: jax tries to start it wherever it finds it, and says at length that
there is no GPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax

_WHEELS = ("jax-cuda13-plugin", "jax-cuda13-pjrt")


def folder() -> Path:
    """Return where the compiler of this version of jax is kept: in $XDG_CACHE_HOME, or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    python = f"py{sys.version_info[0]}{sys.version_info[1]}"
    return cache / "jaxinfer" / f"cuda13-{jax.__version__}-{python}"


def find() -> list[str]:
    """Return what has to be added to the path of modules, or nothing if the compiler is there already.

    Raises:
        RuntimeError: it is nowhere; how to get it.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is not None:
        return []
    if (folder() / "jax_cuda13_plugin").is_dir():
        return [str(folder())]
    raise RuntimeError(
        "no compiler for NVIDIA's GPUs: `python -m pallas_kernels.aot_gpu --install` fetches it (132 MB, needs no GPU)"
    )


def install() -> Path:
    """Fetch the compiler of this version of jax from PyPI into its folder, and return that.

    Raises:
        RuntimeError: pip can't; its last line.
    """
    there = folder()
    if (there / "jax_cuda13_plugin").is_dir():
        return there
    part = there.with_name(f"{there.name}.{os.getpid()}")
    wheels = [f"{name}=={jax.__version__}" for name in _WHEELS]
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(part), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(wheels)}: pip can't install it: {(done.stderr.strip() or '?').splitlines()[-1]}")
    try:
        part.rename(there)  # whole or not at all, whoever else does the same
    except OSError:
        if not (there / "jax_cuda13_plugin").is_dir():
            raise
    return there
