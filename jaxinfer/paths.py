"""Where things live on this machine; the only file that reads these environment variables."""

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"


def cache_dir() -> Path:
    """Return the directory for downloads, compiled programs and measurements: `$JAXINFER_CACHE` or the user's own."""
    if "JAXINFER_CACHE" in os.environ:
        return Path(os.environ["JAXINFER_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "jaxinfer"


def data_dir() -> Path | None:
    """Return the folder of texts and small models for tests and benchmarks, or None where there is none.

    `$JAXINFER_DATA`, by default `shared/data` beside a checkout of the project.
    """
    path = Path(os.environ.get("JAXINFER_DATA") or _BESIDE)
    return path.resolve() if path.is_dir() else None
