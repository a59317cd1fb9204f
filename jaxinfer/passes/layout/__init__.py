"""Lossless changes of how weights lie in memory; which of them pay is measured on each device (device.py)."""

from collections.abc import Sequence
from typing import Any

from jaxinfer.passes.layout.fused import fuse
from jaxinfer.passes.layout.long_last import long_last

LAYOUTS = {"fused": fuse, "long_last": long_last}


def apply_layouts(tree: Any, layouts: Sequence[str]) -> Any:
    """Return the tree in these layouts, applied in order; abstract trees and trees in host memory work too."""
    for layout in layouts:
        tree = LAYOUTS[layout](tree)
    return tree
