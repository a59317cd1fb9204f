"""The kernels, by name: what the tests and the scripts go through."""

import importlib

from pallas_kernels.case import Kernel

KERNELS = (  # for TPUs
    "decode_attention", "quantized_matmul", "paged_decode_attention", "prefill_attention", "kivi_attention",
    "kivi_prefill_attention", "paged_kivi_attention",
)  # fmt: skip
ON_GPUS = (
    "decode_attention", "quantized_matmul", "paged_decode_attention", "prefill_attention", "kivi_attention",
    "kivi_prefill_attention", "paged_kivi_attention",
    # For GPUs alone: XLA for TPU fuses the first, and there a launch, or a loop of no turns, costs nothing.
    "rms_norm", "rope_append", "kivi_pack", "paged_kivi_pack",
)  # fmt: skip
ALL = tuple(dict.fromkeys((*KERNELS, *ON_GPUS)))


def kernel(name: str) -> Kernel:
    """Return a kernel by its name; its cases are made when it is asked for.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in ALL:
        raise ValueError(f"kernel={name!r}: must be one of {', '.join(ALL)}")
    return importlib.import_module(f"pallas_kernels.{name}.cases").KERNEL
