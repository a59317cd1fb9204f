"""Others' kernels, made fit for a static profile, still compute what they are said to compute."""

import functools
from unittest import mock

import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import peers
from pallas_kernels.prefill_attention import reference
from pallas_kernels.prefill_attention.peers import PEERS
from pallas_kernels.tolerance import BOUNDS, relative_error


@pytest.mark.parametrize("shape", [(40,), (2, 3, 7), (1, 1)])
def test_a_table_is_its_numbers(shape):
    rng = np.random.default_rng(0)
    counting = np.arange(np.prod(shape)).reshape(shape)
    for values in (rng.integers(0, 3, shape), counting, np.minimum(counting, 5) % 4, np.zeros(shape)):
        table = peers.Table(values.astype(np.int32))
        assert all(int(table[at]) == values[at] for at in np.ndindex(*shape))


def test_splash_attention_with_its_lists_as_constants_is_causal_attention():
    """Its blocks of slots after the diagonal are skipped, and blocks on it are masked."""
    q = jax.random.normal(jax.random.key(0), (1, 1024, 2, 128))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 1, 1024, 128))
    with mock.patch.object(pl, "pallas_call", functools.partial(_interpreted, pl.pallas_call)):
        found = PEERS["splash_512"](q, k, v, scale=0.1)
    assert relative_error(found, reference(q, k, v, scale=0.1)) < BOUNDS["float32"]


def _interpreted(call, *args, **options):
    return call(*args, **{**options, "interpret": True})
