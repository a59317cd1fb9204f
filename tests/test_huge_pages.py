"""Huge pages change where weights lie and nothing else."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import tiny_config

from jaxinfer import huge_pages, tree
from jaxinfer.loading import lay_out
from jaxinfer.models.transformer import random


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_settling_keeps_every_value_and_the_input(monkeypatch, dtype):
    monkeypatch.setattr(huge_pages, "_SMALL", 1)
    monkeypatch.setattr(huge_pages, "_ARENA", 4096)  # several arenas, and leaves larger than one
    model = random(tiny_config(), dtype=jnp.dtype(dtype))
    before = {name: np.array(leaf) for name, leaf in tree.leaves(model).items()}
    settled = tree.leaves(huge_pages.Arenas().settle(model))
    for name, leaf in settled.items():
        assert leaf.dtype == before[name].dtype
        np.testing.assert_array_equal(np.asarray(leaf), before[name])
        assert leaf.unsafe_buffer_pointer() % 64 == 0
    pointers = [leaf.unsafe_buffer_pointer() for leaf in settled.values()]
    ends = [p + leaf.nbytes for p, leaf in zip(pointers, settled.values(), strict=True)]
    order = np.argsort(pointers)
    assert all(ends[a] <= pointers[b] for a, b in itertools.pairwise(order)), "two leaves share memory"


def test_small_leaves_stay_where_they_are():
    leaf = jnp.ones((8, 8))
    assert huge_pages.Arenas().settle([leaf])[0] is leaf


def test_laying_out_uses_up_the_model_and_keeps_its_values():
    config = tiny_config()
    model = random(config)
    expected = jax.tree.map(np.array, random(config))
    huge_pages.give_back_memory()  # harmless at any time
    laid = lay_out(model, ())
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), laid, expected)
