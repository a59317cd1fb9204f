"""Pallas kernels for the hot loops. This package imports jax (and numpy) only, never jaxinfer, whose ops call it.

A kernel is a folder: `__init__.py` has the contract, `reference.py` the same in plain float32 jax, `tpu.py` the Mosaic
TPU kernel (`gpu.py`: Mosaic GPU), `cases.py` what it is tested and timed on. `kernels.py` lists the kernels.
"""
