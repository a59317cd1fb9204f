"""The GPU's attention to packed groups, with no GPU: its threads run on NumPy arrays, beside the reference."""

import importlib
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from mosaic_emulator import Ref
from test_kernels_gpu_matmul import _bytes
from test_kernels_gpu_warps import WORDS, attend, laid, words_for

from pallas_kernels.decode_attention.gpu_lanes import LOG2E
from pallas_kernels.decode_attention.gpu_operands import Integers
from pallas_kernels.kivi_attention import gpu_nibbles, reference
from pallas_kernels.kivi_attention.gpu_nibbles import Nibbles
from pallas_kernels.tolerance import relative_error

kivi_gpu = importlib.import_module("pallas_kernels.kivi_attention.gpu")  # the packages' `gpu` are their functions
paged_gpu = importlib.import_module("pallas_kernels.paged_kivi_attention.gpu")


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


def _copied(source, slots, stored, refs, b, head, base, end, width):
    """Return what the copies of a block bring to shared memory."""
    groups, part = source.groups, min(source.groups.together, slots)
    memory = {}
    for name in "kv":
        grid = (1, slots // groups.size, width) if name == "k" else (1, slots // part, groups.runs, part)
        shapes = {name: (1, slots // 2, width), f"{name}_scale": grid, f"{name}_offset": grid}
        memory |= {x: Ref(np.full(shape, 255, stored if x == name else np.float32)) for x, shape in shapes.items()}
        memory[f"{name}_barrier"] = types.SimpleNamespace(at=[types.SimpleNamespace(arrivals=0)])
    where = source.find(refs, b, head, jnp.int32(base), jnp.int32(end))
    for name in "kv":
        source.copies(refs, memory, name, where, 0)
        assert memory[f"{name}_barrier"].at[0].arrivals == source.copies_of(slots)
    return {x: ref.read()[0] for x, ref in memory.items() if "barrier" not in x}


def _copy(source, target, barrier):
    target[...] = source.read()
    barrier.arrivals += 1


@pytest.mark.parametrize("page", [None, 32, 64, 128, 384, 512])
def test_copies_bring_a_block_and_zeros_past_the_end(page, monkeypatch):
    """Of all heads and rows, whatever lies beside them."""
    group, runs, H, K, B, slots = (32, 2, 64, 3, 2, 128) if page != 512 else (256, 1, 128, 2, 2, 256)
    for module in (kivi_gpu, paged_gpu):
        fakes = types.SimpleNamespace(copy_gmem_to_smem=_copy)
        monkeypatch.setattr(module, "plgpu", fakes)
        monkeypatch.setattr(module, "pl", types.SimpleNamespace(ds=lambda at, n: slice(int(at), int(at) + n)))
    random, size = np.random.default_rng(0), page or 320
    M = 3 if page else 1
    P = 1 + B * M if page else B
    codes = random.integers(0, 256, (P, 2, K, size // 2, H)).astype(np.uint8)
    key_grids = random.standard_normal((P, 2, K, size // group, H)).astype(np.float32)
    value_grids = random.standard_normal((P, 2, K * runs, size)).astype(np.float32)
    if page:
        table = random.permutation(P)[: B * M].reshape(B, M).astype(np.int32)
        pages = {"codes": codes, "key_grids": key_grids, "value_grids": value_grids}
        source = paged_gpu.PackedPages(jax.tree.map(jnp.asarray, pages), jnp.asarray(table), group)
    else:
        table = np.arange(B)[:, None]
        names = ("k", "v"), ("k_scale", "k_offset"), ("v_scale", "v_offset")
        arrays = {
            name: x[:, i]
            for pair, x in zip(names, (codes, key_grids, value_grids), strict=True)
            for i, name in enumerate(pair)
        }
        source = kivi_gpu.Packed(jax.tree.map(jnp.asarray, arrays), group)
    slots = source.fit(slots)
    refs = {name: Ref(np.asarray(x)) for name, x in source.arrays.items()}
    end = M * size - (group if page else 0)
    for b, head, base in np.ndindex(B, K, -(-end // slots)):
        found = _copied(source, slots, np.uint8, refs, b, head, base * slots, end, H)
        pages = np.where(np.arange(M) * size < end, table[b], P)

        def row(x, i, own, each, pages=pages, base=base, head=head):
            """Return the block's part of a row's pages of array `x`, whose axis `own` has an entry for `each` slots."""
            whole = np.concatenate([x, np.zeros_like(x[:1])])[pages, i]
            lines = whole[:, head * runs : (head + 1) * runs] if own == 2 else whole[:, head]
            joined = np.concatenate(list(lines), axis=-1 if own == 2 else 0)
            axis = joined.ndim - 1 if own == 2 else 0
            padded = np.pad(joined, [(0, slots // each if n == axis else 0) for n in range(joined.ndim)])
            return np.take(padded, np.arange(base * slots // each, (base + 1) * slots // each), axis=axis)

        for i, name in enumerate("kv"):
            np.testing.assert_array_equal(found[name], row(codes, i, 1, 2))
        for i, grid in enumerate(("scale", "offset")):
            np.testing.assert_array_equal(found[f"k_{grid}"], row(key_grids, i, 1, group))
            values = found[f"v_{grid}"].swapaxes(0, 1).reshape(runs, slots)
            np.testing.assert_array_equal(values, row(value_grids, i, 2, 1))
