"""The GPU's attention to packed groups, with no GPU: its threads run on NumPy arrays, beside the reference."""

import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_kernels_gpu_matmul import _bytes
from test_kernels_gpu_warps import WORDS, attend, laid, words_for

from pallas_kernels.decode_attention.gpu_lanes import LOG2E
from pallas_kernels.decode_attention.gpu_operands import Integers
from pallas_kernels.kivi_attention import gpu_nibbles, reference
from pallas_kernels.kivi_attention.gpu_nibbles import Nibbles
from pallas_kernels.tolerance import relative_error


def _words(line):
    """Return the instructions, whose reads of codes never meet in a bank where a line has 128 bytes.

    Of 64 bytes all first rows of a thread's two are in one half of the banks, and two threads meet.
    """

    def several(address, count):
        found, together = _bytes(address, 4 * count).view("<u4"), 32 // count
        for start in range(0, 128, together) if address.buffer.dtype == np.uint8 and address.buffer.size > 4096 else ():
            assert len(set(address.at[start : start + together] // (4 * count) % together)) >= together * line // 128
        return [found[:, i].astype(np.uint32) for i in range(count)]

    return types.SimpleNamespace(**vars(WORDS) | {"several": several})


def _blocks(given, slots, line, codes, key_grids, value_grids):
    """Return blocks as copies lay them: pages of tokens whose grids of values lie together."""
    found, group, part = [], given["group"], min(given["part"], slots)
    for base in range(0, given["S"], slots):
        rows, groups = slice(base // 2, (base + slots) // 2), slice(base // group, (base + slots) // group)
        keys = [x[groups] for x in key_grids]
        values = [
            np.ascontiguousarray(x[:, base : base + slots].reshape(-1, slots // part, part).swapaxes(0, 1))
            for x in value_grids
        ]
        found.append((base, *((laid(x[rows], line), *grids) for x, grids in zip(codes, (keys, values), strict=True))))
    return found


CASES = {
    "group_32": {},
    "group_32_by_256": {"slots": 256, "tokens": 2, "rows": 8},
    "group_64": {"group": 64, "length": 448, "runs": 2, "slots": 256, "rows": 8, "letters": "bf16"},
    "group_64_by_128": {"group": 64, "length": 448, "runs": 2, "rows": 2},
    "group_128": {"group": 128, "runs": 1, "slots": 256, "length": 384},
    "group_128_by_128": {"group": 128, "runs": 4, "length": 384},
    "group_256": {"group": 256, "runs": 2, "slots": 256, "length": 256, "softcap": 5.0},
    "h64": {"H": 64, "runs": 2, "rows": 8, "tokens": 4, "window": 100},
    "h64_group_64": {"H": 64, "runs": 1, "group": 64, "slots": 256, "length": 448},
    "h192": {"H": 192, "runs": 3, "group": 64, "slots": 256, "length": 448},
    "h192_group_32": {"H": 192, "runs": 6, "letters": "f16"},
    "h256": {"H": 256, "runs": 8, "rows": 8, "letters": "bf16"},
    "h256_one_run": {"H": 256, "runs": 1, "group": 64, "slots": 256, "length": 448},
    "wide_grids": {"grid": np.float32, "length": 32},
    "pages_of_32": {"part": 32, "slots": 256},
    "pages_of_64": {"part": 64, "length": 448, "group": 64, "runs": 2, "slots": 256},
    "pages_of_128": {"part": 128, "group": 128, "runs": 2, "slots": 256, "length": 384},
    "nothing": {"length": 0},
    "steps": {"spread": 1e3},
    "tile_2": {"first": 8, "rows": 8, "tokens": 5, "window": 50},
    "cluster": {"splits": 4, "rows": 8, "tokens": 2},
    "cluster_8": {"splits": 8, "H": 64, "runs": 2, "S": 1024, "length": 992, "letters": "bf16"},
}


@pytest.mark.parametrize("name", CASES)
def test_threads_find_what_the_reference_does(name, monkeypatch):
    given = {"H": 128, "rows": 4, "tokens": 1, "slots": 128, "S": 512, "length": 416, "group": 32, "runs": 4}
    given |= {"part": 1 << 30, "grid": ml_dtypes.bfloat16, "ahead": 40, "window": None, "softcap": None, "first": 0}
    given |= {"letters": "f32", "splits": 1, "spread": 1.0} | CASES[name]
    H, rows, T, S, slots = (given[x] for x in ("H", "rows", "tokens", "S", "slots"))
    group, runs, length, first = (given[x] for x in ("group", "runs", "length", "first"))
    random, line = np.random.default_rng(0), 128 if H % 128 == 0 else 64
    words_for(monkeypatch, _words(line), gpu_nibbles)
    scale, softcap = H**-0.5, given["softcap"]
    tile = Nibbles(
        slots // 8, line, H // line, rows, T, scale * LOG2E if softcap is None else scale / softcap, softcap,
        given["window"], 0, 0, Integers, group, runs, min(given["part"], slots),
    )  # fmt: skip
    q = random.standard_normal((rows, H)).astype(ml_dtypes.bfloat16)
    codes = [random.integers(0, 256, (S // 2, H)).astype(np.uint8) for _ in "kv"]
    key_grids = [random.uniform(0.05, 0.3, (S // group, H)), random.standard_normal((S // group, H))]
    value_grids = [random.uniform(0.05, 0.3, (runs, S)), random.standard_normal((runs, S))]
    value_grids[0] *= given["spread"] ** random.uniform(-1, 1, (runs, S))
    key_grids, value_grids = ([x.astype(given["grid"]) for x in grids] for grids in (key_grids, value_grids))
    dead = np.arange(S) >= length
    spoiled = [
        [np.where(dead[:: group if i == 0 else 1][:, None], np.nan, x.T if i else x) for x in grids]
        for i, grids in enumerate((key_grids, value_grids))
    ]
    spoiled = [[x.astype(given["grid"]) for x in spoiled[0]], [x.T.astype(given["grid"]) for x in spoiled[1]]]
    position = length + given["ahead"]
    with np.errstate(all="ignore"):
        blocks = _blocks(given, slots, line, codes, *spoiled)
        out, lse = attend(
            gpu_nibbles, tile, q, blocks, 0, length, position, None, given["letters"], given["splits"], first
        )
    # A row of the tile is a row of the call past `first` of them, whose token is its number's remainder.
    tokens = (first + np.arange(rows)) % T
    queries = np.zeros((rows, T, H), np.float32)
    queries[np.arange(rows), tokens] = q
    k, v = (jnp.asarray(x)[None, None] for x in codes)
    expected, expected_lse = reference(
        jnp.asarray(queries.swapaxes(0, 1))[None], k, v, *(jnp.asarray(x)[None, None] for x in key_grids),
        *(jnp.asarray(x)[None] for x in value_grids), jnp.array([length]), scale=scale, group=group,
        position=jnp.array([position]), window=given["window"], softcap=softcap, return_lse=True,
    )  # fmt: skip
    expected = np.asarray(expected)[0][tokens, np.arange(rows)]
    expected_lse = np.asarray(expected_lse)[0][tokens, np.arange(rows)]
    lse = lse[:rows]
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(lse)
    assert finite.all() == (length > 0)
    np.testing.assert_allclose(lse[finite], expected_lse[finite], atol=2e-3)
    assert relative_error(out, expected) <= (1e-3 if given["letters"] == "f32" else 4e-3)
