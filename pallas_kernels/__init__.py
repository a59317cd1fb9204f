"""Pallas kernels. This package imports jax only, never jaxinfer. It is empty so far: ops run on XLA."""
