"""Lossless changes of how weights lie in memory; which of them pay is measured on each device (device.py)."""

from jaxinfer.passes.layout.fused import fuse
from jaxinfer.passes.layout.outputs_first import outputs_first

LAYOUTS = {"fused": fuse, "outputs_first": outputs_first}
