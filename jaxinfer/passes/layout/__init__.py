"""Lossless changes of how weights lie in memory; which of them pay is measured on each device (device.py)."""

from jaxinfer.passes.layout.fused import fuse
from jaxinfer.passes.layout.long_last import long_last

LAYOUTS = {"fused": fuse, "long_last": long_last}
