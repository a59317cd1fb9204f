"""The GPU's attention to codes as they are, with no GPU: its threads run on NumPy arrays, beside the reference.

And what the blocks of a cluster send each other and merge, whatever found it.
"""

import dataclasses
import types

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_kernels_gpu_matmul import MACHINE, _bytes

from pallas_kernels.decode_attention import (
    gpu_cluster,
    gpu_lanes,
    gpu_merge_warps,
    gpu_operands,
    gpu_warp,
    reference,
)
from pallas_kernels.decode_attention.gpu_cluster import Cluster, Parts
from pallas_kernels.decode_attention.gpu_lanes import LEAST, LOG2E, Tile
from pallas_kernels.decode_attention.gpu_operands import Halves, Integers
from pallas_kernels.tolerance import relative_error

THREADS = np.arange(128)
LARGEST_QUERIES = 4096  # bytes


def _number(value):
    return np.full(128, value & 0xFFFFFFFF, np.uint32) if isinstance(value, int) else value


def _signed(a):
    return a.astype(np.uint32).view(np.int32)


def _as_words(pair):
    return np.ascontiguousarray(pair).view("<u4").reshape(128).astype(np.uint32)


def _four_words(address):
    found = _bytes(address, 16).view("<u4")
    if address.buffer.size > LARGEST_QUERIES:  # shared memory: read by eight threads at a time, of four banks each
        for start in range(0, 128, 8):
            assert len(set(address.at[start : start + 8] // 16 % 8)) == 8
    return [found[:, i].astype(np.uint32) for i in range(4)]


def _parts_words(address):
    """As `_four_words`, of what the blocks of a cluster send, where threads may read the same."""
    found = _bytes(address, 16).view("<u4")
    for start in range(0, 128, 8):
        pieces = np.unique(address.at[start : start + 8] // 16)
        assert len(np.unique(pieces % 8)) == len(pieces)
    return [found[:, i].astype(np.uint32) for i in range(4)]


def _two_words(address):
    found = _bytes(address, 8).view("<u4")
    return found[:, 0].astype(np.uint32), found[:, 1].astype(np.uint32)


def _keep_words(address, words):
    data = np.stack(words, axis=1).astype("<u4").view(np.uint8)
    address.buffer[address.at[:, None] + np.arange(4 * len(words))] = data


def _write_words(address, words, wanted):
    data = np.stack(words, axis=1).astype("<u4").view(np.uint8)
    for thread in np.flatnonzero(wanted):
        address.buffer[address.at[thread] + np.arange(data.shape[1])] = data[thread]


@dataclasses.dataclass
class There:
    """Where in the shared memory of which block of the cluster each thread points."""

    block: np.ndarray
    at: np.ndarray


def _send_words(address, words):
    data = np.stack(words, axis=1).astype("<u4").view(np.float32)
    assert (address.at % (4 * len(words)) == 0).all()
    for thread, (block, at) in enumerate(zip(address.block, address.at // 4, strict=True)):
        held = CLUSTER[block][at : at + len(words)]
        assert (np.isnan(held) | (held == data[thread])).all(), "sent to one place from two"
        held[:] = data[thread]


CLUSTER: list[np.ndarray] = []  # what each block is sent


def _integer_product(sums, left, right):
    """Return what `mma.m16n8k32` does, as the tables of its fragments in NVIDIA's PTX manual have it."""
    warp, row, quarter = THREADS // 32, THREADS % 32 // 4, THREADS % 4
    a, b, d = np.zeros((4, 16, 32), int), np.zeros((4, 32, 8), int), np.zeros((4, 16, 8), int)
    for i in range(4):
        for k in range(4):
            byte = left[i].astype("<u4").view(np.int8).reshape(128, 4)[:, k]
            a[warp, row + 8 * (i % 2), 4 * quarter + k + 16 * (i // 2)] = byte
            if i < 2:
                b[warp, 4 * quarter + k + 16 * i, row] = right[i].astype("<u4").view(np.int8).reshape(128, 4)[:, k]
        if sums is not None:
            d[warp, row + 8 * (i // 2), 2 * quarter + i % 2] = _signed(sums[i])
    d += a @ b
    assert np.abs(d).max() < 2**31
    return [d[warp, row + 8 * (i // 2), 2 * quarter + i % 2].astype(np.int32).view(np.uint32) for i in range(4)]


def _halves_of(codes):
    found = codes.astype("<u4").view(ml_dtypes.float8_e4m3fn).reshape(128, 4).astype(np.float16)
    return _as_words(found[:, :2]), _as_words(found[:, 2:])


def _highest(a):
    return np.repeat(a.reshape(4, 32).max(axis=1), 32)


WORDS = types.SimpleNamespace(
    **vars(MACHINE)
    | {
        "number": _number,
        "add": lambda a, b: a + _number(b),
        "both": lambda a, b: a & _number(b),
        "differ": lambda a, b: a ^ _number(b),
        "several": lambda address, count: {4: _four_words, 2: _two_words}[count](address),
        "keep_words": _keep_words,
        "write_words": _write_words,
        "integer_product": _integer_product,
        "multiplied": MACHINE.product,
        "halves_of": _halves_of,
        "as_float": lambda a: a.astype(np.uint32).view(np.float32),
        "as_word": lambda a: a.astype(np.float32).view(np.uint32),
        "to_float": lambda a: _signed(a).astype(np.float32),
        "pair_of": lambda a, b: _as_words(np.stack([a, b], axis=1).astype(ml_dtypes.bfloat16)),
        "half_pair_of": lambda a, b: _as_words(np.stack([a, b], axis=1).astype(np.float16)),
        "product": lambda a, b: a * b,
        "minus": lambda a, b: a - b,
        "higher": np.fmax,
        "magnitude": np.abs,
        "exp2": np.exp2,
        "log2": np.log2,
        "inverse": lambda a: (1 / a).astype(np.float32),
        "above": lambda a, b: a > b,
        "take": lambda a, b: a - b,
        "lesser": lambda a, b: np.minimum(_signed(a), _signed(b)).view(np.uint32),
        "greater": lambda a, b: np.maximum(_signed(a), _signed(b)).view(np.uint32),
        "below": lambda a, b: a < b,
        "any_of": lambda a, b: a | b,
        "all_of": lambda a, b: a & b,
        "shifted": lambda a, by: a >> by,
        "select": np.where,
        "neighbour": lambda a, distance: a[THREADS ^ distance],
        "highest": _highest,
        "meet": lambda: None,
        "of_block": lambda block, address: There(block, address.at),
        "send_words": _send_words,
        "meet_cluster": lambda seen: None,
    }
)


PARTS = types.SimpleNamespace(
    **vars(WORDS) | {"several": lambda address, count: {4: _parts_words, 2: _two_words}[count](address)}
)


def words_for(monkeypatch, words=WORDS, *more):
    """Have the threads' modules run on NumPy arrays."""
    for module in (gpu_lanes, gpu_merge_warps, gpu_operands, gpu_warp, *more):
        monkeypatch.setattr(module, "words", words)
    monkeypatch.setattr(gpu_cluster, "words", PARTS)


def laid(codes, line):
    """Return codes `[slots, H]` as a copy lays them: tiles of eight slots and a line, their pieces moved about."""
    slots, H = codes.shape
    tiles = codes.reshape(slots // 8, 8, H // line, line).transpose(0, 2, 1, 3)
    pieces = np.ascontiguousarray(tiles).view(np.uint8).reshape(slots // 8, H // line, 8, line // 16, 16)
    found = np.empty_like(pieces)
    for row in range(8):
        turn = row if line == 128 else row // 2
        found[:, :, row, np.arange(line // 16) ^ turn] = pieces[:, :, row]
    return found.reshape(-1)


def attend(threads, tile, q, blocks, start, length, position, tree, letters, splits, first=0):
    """Return the output and its log-sum-exp of one key head, from a loop of blocks as the kernel's body has it.

    `blocks` are each block's first slot, keys and values, with what comes beside them.
    """
    H = q.shape[1]
    start, length, position = (_number(int(x)) for x in (start, length, position))
    fixed = threads.prepare(tile, q, tree, start, length, position, _number(first))
    assert len(fixed) == tile.fixed
    alive = start, WORDS.greater(length - start, _number(0))
    out = np.full((tile.rows, H), 7, {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}[letters])
    lse = np.zeros(8, np.float32)
    cluster = Cluster(splits, 8, H, tile.rows, H)
    CLUSTER[:] = [np.full(cluster.floats, np.nan, np.float32) for _ in range(splits)]
    parts = [Parts(cluster, held, _number(i)) for i, held in enumerate(CLUSTER)]
    each = -(-len(blocks) // splits)
    for split in range(splits):
        sums = [np.zeros(128, np.float32) for _ in range(tile.sums)]
        sums[-2] = np.full(128, LEAST, np.float32)
        for base, keys, values in blocks[split * each : (split + 1) * each]:
            found = threads.scores(tile, fixed, *keys, _number(base), start)
            assert len(found) == tile.scores
            sums = threads.mix(tile, sums, found, *values, _number(base), alive)
            assert len(sums) == tile.sums
        to = parts[split] if splits > 1 else gpu_merge_warps.Output(tile, out, letters, lse)
        threads.finish(tile, sums, np.zeros(128 * H, np.uint8), np.zeros(256, np.uint8), to)
    for part in parts if splits > 1 else ():
        part.merge(_number(0), out, letters, lse)
    return out.astype(np.float32), lse[: tile.rows]


CASES = {
    "plain": {},
    "short": {"length": 5, "rows": 4},
    "h64": {"H": 64, "rows": 8, "letters": "bf16"},
    "h192": {"H": 192, "rows": 2, "tokens": 2},
    "h256": {"H": 256, "rows": 8, "tokens": 4, "letters": "f16"},
    "bfloat16_scales": {"scales": ml_dtypes.bfloat16, "softcap": 5.0},
    "256_slots": {"slots": 64, "rows": 8, "tokens": 2},
    "window": {"window": 100, "rows": 8, "tokens": 4, "start": 150},
    "sinks": {"window": 100, "sinks": 4, "rows": 8, "tokens": 4, "start": 2},
    "nothing": {"length": 0},
    "tree": {"tree": 5, "tokens": 5, "rows": 5, "window": 60},
    "tree_40": {"tree": 40, "tokens": 40, "rows": 8},
    "far_ahead": {"sink_score": 14.0},
    "float8": {"float8": True, "rows": 8, "tokens": 2, "start": 3},
    "float8_h64": {"float8": True, "H": 64, "scales": ml_dtypes.bfloat16, "spread": 1e3},
    "steps": {"spread": 1e4},
    "cluster": {"splits": 2, "rows": 8, "tokens": 2, "letters": "bf16"},
    "cluster_16": {"splits": 16, "H": 64, "rows": 3, "letters": "f16"},
    "cluster_window": {"splits": 4, "window": 100, "sinks": 4, "rows": 8, "tokens": 4, "start": 2},
    "cluster_nothing": {"splits": 8, "length": 0, "H": 192},
    "cluster_float8": {"splits": 4, "H": 256, "tree": 5, "tokens": 5, "rows": 5, "float8": True},
}


@pytest.mark.parametrize("name", CASES)
def test_threads_find_what_the_reference_does(name, monkeypatch):
    words_for(monkeypatch)
    given = {"H": 128, "rows": 4, "tokens": 1, "slots": 32, "S": 512, "length": 400, "start": 0, "window": None}
    given |= {"sinks": 0, "softcap": None, "tree": 0, "scales": np.float32, "letters": "f32", "spread": 1.0}
    given |= {"sink_score": None, "float8": False, "splits": 1} | CASES[name]
    H, rows, T, S, length, start = (given[x] for x in ("H", "rows", "tokens", "S", "length", "start"))
    random = np.random.default_rng(0)
    line = 128 if H % 128 == 0 else 64
    scale, softcap = H**-0.5, given["softcap"]
    tile = Tile(
        given["slots"], line, H // line, rows, T, scale * LOG2E if softcap is None else scale / softcap, softcap,
        given["window"], given["sinks"], -(-given["tree"] // 32), Halves if given["float8"] else Integers,
    )  # fmt: skip
    q = random.standard_normal((rows, H)).astype(ml_dtypes.bfloat16)
    k, v = (random.integers(-127, 128, (S, H)).astype(np.int8) for _ in "kv")
    k_scale, v_scale = ((random.uniform(0.5, 1.5, S) / 64).astype(given["scales"]) for _ in "kv")
    if given["float8"]:
        k, v = ((x / 8).astype(ml_dtypes.float8_e4m3fn) for x in (k, v))
    v_scale = (v_scale * given["spread"] ** random.uniform(-1, 1, S)).astype(given["scales"])
    if given["sink_score"]:
        k[0] = np.clip(np.round(q[0].astype(np.float32) * 60), -127, 127)
        v[0], k_scale[0] = 0, given["sink_score"] / (60 * H**0.5)
    seen, tree = None, None
    if given["tree"]:
        seen = np.tril(random.integers(0, 2, (T, T)).astype(bool)) | np.eye(T, dtype=bool)
        words = np.zeros((tile.tree_words + 1, 8), np.int32)
        for row in range(rows):
            bits = np.packbits(np.pad(seen[row % T], (0, 32 * tile.tree_words - T)), bitorder="little")
            words[:-1, row], words[-1, row] = bits.view("<i4"), seen[row % T].sum() - 1
        tree = words
    dead = (np.arange(S) < start) | (np.arange(S) >= length)
    worst = np.nan if given["float8"] else 127
    spoiled = [np.where(dead[:, None], worst, x.astype(np.float32)).astype(x.dtype) for x in (k, v)]
    spoiled += [np.where(dead, np.nan, x).astype(x.dtype) for x in (k_scale, v_scale)]
    with np.errstate(all="ignore"):
        k_codes, v_codes, *scales = spoiled
        slots = 4 * tile.slots
        blocks = [
            (base, *((laid(x[base : base + slots], line), y[base : base + slots]) for x, y in pairs))
            for base in range(0, S, slots)
            for pairs in [zip((k_codes, v_codes), scales, strict=True)]
        ]
        out, lse = attend(gpu_warp, tile, q, blocks, start, length, length - T, tree, given["letters"], given["splits"])
    groups = -(-rows // T)
    whole = np.zeros((groups * T, H), ml_dtypes.bfloat16)
    whole[:rows] = q
    queries = whole.reshape(groups, T, H).transpose(1, 0, 2)[None]
    expected, expected_lse = reference(
        jnp.asarray(queries, jnp.float32), *(jnp.asarray(x)[None, None] for x in (k, v)), jnp.array([length]),
        scale=scale, start=jnp.array([start]), window=given["window"], sinks=given["sinks"], softcap=softcap,
        tree=None if seen is None else jnp.asarray(seen), k_scale=jnp.asarray(k_scale)[None, None],
        v_scale=jnp.asarray(v_scale)[None, None], return_lse=True,
    )  # fmt: skip
    expected = np.asarray(expected)[0].transpose(1, 0, 2).reshape(-1, H)[:rows]
    expected_lse = np.asarray(expected_lse)[0].T.reshape(-1)[:rows]
    assert np.array_equal(np.isneginf(lse), np.isneginf(expected_lse))
    finite = np.isfinite(lse)
    np.testing.assert_allclose(lse[finite], expected_lse[finite], atol=2e-3)
    assert relative_error(out, expected) <= (1e-3 if given["letters"] == "f32" else 4e-3)


@pytest.mark.parametrize(
    ("splits", "columns", "rows", "H", "tile"),
    [(2, 8, 3, 64, 0), (16, 8, 8, 128, 0), (4, 16, 28, 80, 1), (8, 64, 64, 128, 0)],
)
def test_a_cluster_merges_what_its_matrix_units_find(splits, columns, rows, H, tile, monkeypatch):
    """Where nothing is found the output is 0, also of a row that no block finds anything for."""
    words_for(monkeypatch)
    random, width = np.random.default_rng(0), -(-H // 64) * 64
    cluster = Cluster(splits, columns, width, rows, H)
    CLUSTER[:] = [np.full(cluster.floats, np.nan, np.float32) for _ in range(splits)]
    acc = random.standard_normal((splits, width, columns)).astype(np.float32)
    peak = (random.standard_normal((splits, columns)) * 9).astype(np.float32)
    total = random.uniform(1, 60, (splits, columns)).astype(np.float32)
    for nothing in ((-1, ...), (slice(None), ..., 1)):
        acc[nothing], peak[nothing], total[nothing] = 0, LEAST, 0
    parts = [Parts(cluster, held, _number(i)) for i, held in enumerate(CLUSTER)]
    for part, *found in zip(parts, acc, peak, total, strict=True):
        part.put_matrix(*(_in_registers(x) for x in found))
    assert not any(np.isnan(held).any() for held in CLUSTER)
    out, lse = np.full((rows, H), 7, np.float32), np.full(rows, 7, np.float32)
    first = tile * columns
    with np.errstate(divide="ignore"):
        for part in parts:
            part.merge(_number(first), out, "f32", lse)
        expected = peak.max(axis=0) + np.log2((total * np.exp2(peak - peak.max(axis=0))).sum(axis=0))
    weights = total * np.exp2(peak - np.where(np.isneginf(expected), 0, expected))
    mixed = np.einsum("shc,sc->ch", acc, weights)[: rows - first, :H]
    assert (out[:first] == 7).all() and (lse[:first] == 7).all()
    np.testing.assert_allclose(out[first:], mixed, atol=1e-5)
    np.testing.assert_allclose(lse[first:], (expected / LOG2E)[: rows - first], rtol=1e-5)


def _in_registers(x):
    """Return a matrix, or a row of one, as the threads hold it: strips of 64 rows, in each 8 columns after another."""
    warp, row, quarter = THREADS // 32, THREADS % 32 // 4, THREADS % 4
    pairs = [2 * quarter + 8 * n + c for n in range(x.shape[-1] // 8) for c in (0, 1)]
    if x.ndim == 1:
        return [x[column] for column in pairs]
    eights = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    rows = [[64 * strip + 8 * half + 16 * warp + row for half in (0, 1)] for strip in range(x.shape[0] // 64)]
    return [x[at, column] for halves in rows for eight in eights for at in halves for column in eight]
