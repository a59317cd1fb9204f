"""For which kind of device is being traced, and the kernel written for that one."""

import types
from collections.abc import Callable
from typing import Any

from pallas_kernels import chips, gpus


def platform() -> str | None:
    """Return what JAX calls the kind of device that is traced for, "tpu" or "cuda"; None where no kernel is for it."""
    if chips.target() is not None:
        return "tpu"
    return None if gpus.target() is None else "cuda"


def kernel(of: types.ModuleType) -> Callable[..., Any]:
    """Return a kernel's function for that device; that for TPUs where it is none, as for an interpreter.

    Raises:
        NotImplementedError: there is none for it.
    """
    which = "gpu" if platform() == "cuda" else "tpu"
    found = getattr(of, which, None)
    if found is None:
        raise NotImplementedError(f"{of.__name__.rsplit('.', 1)[-1]}: has no kernel for {which.upper()}s")
    return found
