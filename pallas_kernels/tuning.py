"""Block sizes, per chip and shape class, from tables; never one default.

Those of TPUs are written by `scripts/tune_kernels.py`, from static cycles; those of GPUs by `scripts/bench_kernels.py
--gpu-blocks`, from times, where other blocks than the kernel's own choice were faster.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pallas_kernels.chips import Chip

FOLDER = Path(__file__).parent / "blocks"
NEAR = 1.5  # of the distance of shape classes: up to which blocks of a GPU are taken for another shape


@functools.cache
def table(kernel: str) -> list[dict[str, Any]]:
    """Return the entries of a kernel: `{"chip", "class", "blocks", "cycles"}`, as they were tuned."""
    path = FOLDER / f"{kernel}.json"
    return json.loads(path.read_text()) if path.exists() else []


def blocks(kernel: str, chip: str, shape: dict[str, int | str]) -> dict[str, int]:
    """Return the blocks tuned for the nearest shape class of a chip.

    Words of a class must be equal; numbers are compared by their ratio. A chip without entries takes a v5e's.

    Raises:
        NotImplementedError: no entry has the words of this class.
    """
    for name in dict.fromkeys((chip, "v5e", "v6e")):
        found = _nearest([entry for entry in table(kernel) if entry["chip"] == name], shape)
        if found is not None:
            return found
    raise NotImplementedError(f"{kernel}: no blocks are tuned for {shape}; see scripts/tune_kernels.py")


def gpu_blocks(kernel: str, gpu: str, shape: dict[str, int | str]) -> dict[str, int]:
    """Return the blocks measured for a near shape class on a GPU, or on another one; none where none is near."""
    found = table(f"{kernel}_gpu")
    for entries in ([e for e in found if e["chip"] == gpu], found):
        near = _nearest(entries, shape, NEAR)
        if near is not None:
            return near
    return {}


def fitting(blocks: dict[str, int], slot_bytes: int, chip: Chip) -> dict[str, int]:
    """Return blocks with as many slots as half of a kernel's VMEM holds, `slot_bytes` each: others may be wider."""
    return halved(blocks, {"slots": 32}, lambda b: b["slots"] * b["buffers"] * slot_bytes <= chip.vmem_limit // 2)


def halved(blocks: dict[str, int], least: dict[str, int], fits: Callable[[dict[str, int]], bool]) -> dict[str, int]:
    """Return blocks of which those in `least` are halved, one after the other down to its least, until they fit."""
    for name, end in least.items():
        while blocks[name] > end and not fits(blocks):
            blocks = blocks | {name: blocks[name] // 2}
    return blocks


def _nearest(
    entries: list[dict[str, Any]], shape: dict[str, int | str], most: float = math.inf
) -> dict[str, int] | None:
    """Return the blocks of the first of the entries whose class is nearest, `most` away at most; None without one."""
    far = [(distance, i) for i, e in enumerate(entries) if (distance := _distance(e["class"], shape)) is not None]
    distance, i = min(far, default=(math.inf, 0))
    return dict(entries[i]["blocks"]) if far and distance <= most else None


def _distance(entry: dict[str, Any], shape: dict[str, Any]) -> float | None:
    total = 0.0
    for key, value in shape.items():
        other = entry.get(key)
        if isinstance(value, str):
            if other != value:
                return None
        elif other is not None:
            total += abs(_log2(value) - _log2(other))
    return total


def _log2(n: int) -> float:
    return math.log2(max(n, 1))
