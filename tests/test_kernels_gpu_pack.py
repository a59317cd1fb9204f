"""The GPU's packing of groups with no GPU: its threads run on NumPy arrays, and which programs hold it."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gpu_grid import run_here
from test_gpu import CALL, lowered, struct
from test_kernels_gpu_append import _machine

from jaxinfer.cache import packing
from jaxinfer.cache.groups import quantize_groups
from jaxinfer.cache.kivi import Kivi
from pallas_kernels import gpus
from pallas_kernels.decode_attention import gpu_lanes
from pallas_kernels.kernels import kernel
from pallas_kernels.kivi_pack import gpu_thread
from pallas_kernels.kivi_pack.cases import NAMES
from pallas_kernels.kivi_pack.reference import completed, packed

pack_gpu = importlib.import_module("pallas_kernels.kivi_pack.gpu")  # the package's `gpu` is its function


def _words():
    """Return the instructions, of which writes are counted."""
    machine, counted = _machine(), []

    def write_words(address, words, wanted):
        counted.append(4 * len(words) * int(wanted.sum()))
        machine.write_words(address, words, wanted)

    def write_part(address, word, size, wanted):
        counted.append(size * int(wanted.sum()))
        machine.write_part(address, word, size, wanted)

    more = {"smaller": np.minimum, "larger": np.maximum, "write_words": write_words, "write_part": write_part}
    return type(machine)(**vars(machine) | more), counted


def _bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


CASES = [(name, case) for name in ("kivi_pack", "paged_kivi_pack") for case in kernel(name).tests]


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda x: getattr(x, "name", x))
def test_its_threads_write_what_the_reference_does(name, case, monkeypatch):
    """Bit for bit, and nothing twice; slots of the ring that are none of the group's hold NaN."""
    words, counted = _words()
    for module in (gpu_lanes, gpu_thread):
        monkeypatch.setattr(module, "words", words)
    run_here(monkeypatch, pack_gpu)
    inputs = jax.tree.map(jnp.asarray, case.inputs())
    spoiled = jax.tree.map(jnp.asarray, case.spoil(case.inputs()))
    assert np.isnan(np.asarray(spoiled["k"], np.float32)).any()
    (found,) = kernel(name).gpu(**spoiled, **case.options)
    (expected,) = jax.jit(functools.partial(kernel(name).reference, **case.options))(**inputs)
    for x, one, other in zip(case.donated, found, expected, strict=True):
        np.testing.assert_array_equal(_bits(one), _bits(other), err_msg=x)
        assert (_bits(other) != _bits(inputs[x])).any()  # something was to be written
    (_, K, _, H), group = inputs["k"].shape, case.options["group"]
    M = inputs["table"].shape[1] * inputs["key_grids"].shape[3] if "table" in inputs else inputs["k_scale"].shape[2]
    _, complete = completed(inputs["start"], inputs["counts"], group, M)
    runs = max(H // group, 1)
    assert sum(counted) == int(complete.sum()) * K * (group * H + 4 * H + 4 * group * runs)


@pytest.mark.parametrize(("G", "H"), [(32, 128), (64, 64), (128, 64)])
def test_the_reference_packs_as_a_cache_does(G, H):
    """Bit for bit where XLA divides as it is told to, and does not multiply by the reciprocal instead."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((3, 2, G, H)), jnp.bfloat16) for _ in "kv")
    k, v = k.at[0, 0].set(1.5), v.at[1, 1, 5].set(0)  # grids of one number
    quantize = jax.jit(lambda k, v: quantize_groups(k[:, :, None], v[:, :, None], 4)).lower(k, v)
    groups = quantize.compile({"xla_disable_hlo_passes": "algsimp"})(k, v)
    found = jax.jit(packed, static_argnums=2)(k, v, groups.v_scale.shape[1] // 2)
    for name, one in zip(NAMES, found, strict=True):
        expected = getattr(groups, name)
        assert one.dtype == expected.dtype
        np.testing.assert_array_equal(_bits(one).reshape(-1), _bits(expected).reshape(-1), err_msg=name)


def _layer(B=2, T=1, H=128, dtype=jnp.bfloat16, slots=1024, **options):
    layer = jax.eval_shape(lambda: Kivi(**options).create(B, slots, 2, H, dtype))
    k = struct(B, T, 2, H, dtype=dtype)
    return layer, k, k, *(struct(B, dtype=jnp.int32) for _ in range(2))


def _append(layer, k, v, start, counts):
    return layer.append(k, v, start, counts)


@pytest.mark.parametrize("more", [{}, {"T": 8}, {"group": 64}, {"H": 64, "group": 128}, {"page": 64}], ids=str)
def test_programs_hold_it_where_tokens_are_few(more):
    text = lowered(_append, *_layer(**more))
    assert text.count(CALL) == 1 and "stablehlo.while" not in text


@pytest.mark.parametrize(
    "more", [{"T": 40}, {"dtype": jnp.float32}, {"H": 96}, {"bits": 2}, {"group": 16}, {"group": 256}], ids=str
)
def test_xla_packs_the_rest(more):
    assert CALL not in lowered(_append, *_layer(**more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"bits": 2}, "codes of 2 bits"),
        ({"dtype": jnp.float32}, "a ring of float32"),
        ({"group": 16}, "groups of 16, H=128"),
        ({"H": 192}, "H=192"),
    ],
)
def test_it_says_what_it_can_not_do(more, message):
    layer, *_, start, counts = _layer(**more)
    pack = functools.partial(packing.pack_completed, tokens=1, implementation="pallas")
    with gpus.assume("h100"), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(pack, layer.groups, layer.recent, start, counts)


@pytest.mark.parametrize("page", [None, 64])
def test_a_cache_packs_by_it_as_by_xla(page, monkeypatch):
    """With the reference in the kernel's place, over steps of few tokens; codes differ by one, and seldom, where XLA
    multiplies by a reciprocal."""
    kind, B, K, H = Kivi(group=32, residual=10, page=page), 3, 2, 64
    rng, layers, called = np.random.default_rng(0), {}, []

    def choose(_, pallas, xla, *operands):
        if which == "xla":
            return xla(*operands)
        called.append(1)
        return pallas(*operands)

    monkeypatch.setattr(packing.targets, "kernel", lambda of: of.reference)
    monkeypatch.setattr(packing, "choose", choose)
    counts = rng.integers(0, 9, (40, B)).astype(np.int32)
    k, v = (jnp.asarray(rng.standard_normal((40, B, 8, K, H)), jnp.bfloat16) for _ in "kv")
    for which in ("xla", "pallas"):
        step, length = jax.jit(lambda layer, *x: layer.append(*x)), np.zeros(B, np.int32)
        layers[which] = kind.create(B, 160, K, H, jnp.bfloat16)
        for i in range(40):
            layers[which] = step(layers[which], k[i], v[i], length, counts[i])
            length = length + counts[i]
    assert called and (length > 96).all() and (length // 32 >= 5).any()  # more groups than there is room for
    found, expected = layers["pallas"], layers["xla"]
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.any()
        if one.dtype != np.uint8:
            np.testing.assert_array_equal(_bits(one), _bits(other))
            continue
        apart = [np.abs((one >> by & 15).astype(int) - (other >> by & 15)) for by in (0, 4)]
        assert max(x.max() for x in apart) <= 1 and max(x.mean() for x in apart) < 1e-3
