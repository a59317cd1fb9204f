"""Kernels for GPUs, run on NumPy from the PTX that they are compiled to: what one computes, and where it is wrong.

`parse` reads PTX; `translate`, `operands` and `writer` make Python of it; `launch` reads how a kernel is started;
`machine` runs `blocks` of `warp`s over `memory`, with `numbers` and `matrices` for arithmetic; `run` compiles kernels
and has them run so. It tells nothing of speed.
"""
