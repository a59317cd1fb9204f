"""Others' kernels, made fit for a static profile, still compute what they are said to compute."""

import functools
import json
from unittest import mock

import bench_kernels
import jax
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas.ops.tpu import ragged_paged_attention

from pallas_kernels import chips, peers
from pallas_kernels.paged_decode_attention.peers import jax_ragged_paged_attention
from pallas_kernels.prefill_attention import reference
from pallas_kernels.prefill_attention.peers import PEERS
from pallas_kernels.tolerance import BOUNDS, relative_error


def test_a_run_that_was_stopped_goes_on_and_makes_a_table_of_what_it_has(tmp_path, monkeypatch, capsys):
    out, ran = tmp_path / "kernels.jsonl", []
    done = {"kernel": "decode_attention", "case": "b4_s4096", "chip": "v5e", "implementation": "pallas"}
    figures = {"cycles": 100, "predicted_us": 50.0, "bandwidth_share": 0.9, "mxu_share": 0.1}
    out.write_text(json.dumps(done | figures) + "\n")

    def profile(kernel, case, chip, peer=None):
        ran.append((case, chip))
        key = {"kernel": kernel, "case": case, "chip": chip, "implementation": peer or "pallas"}
        return key | (figures if case == "b4_s4096" else {"error": "it aborts"})

    monkeypatch.setattr(bench_kernels.static_profile, "profile", profile)
    cases = ["--kernels", "decode_attention", "--cases", "b4_s4096,ragged"]
    bench_kernels.main(["--tpu-static", "v5e", *cases, "--jobs", "1", "--out", str(out)])
    assert ran == [("ragged", "v5e")]
    with out.open("a") as file:
        file.write(json.dumps(profile("decode_attention", "ragged", "v6e", peer="theirs")) + "\n")
        file.write(json.dumps(profile("decode_attention", "b4_s4096", "v5e", peer="theirs") | {"predicted_us": 75.0}))
    capsys.readouterr()
    bench_kernels.main(["--table", str(out)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| decode_attention | b4_s4096 | 50.0 us, 90% HBM | theirs 1.50x | not run |  |",
        "| decode_attention | ragged | it aborts |  | not run |  |",
    ]


@pytest.mark.parametrize("shape", [(40,), (2, 3, 7), (1, 1)])
def test_a_table_is_its_numbers(shape):
    rng = np.random.default_rng(0)
    counting = np.arange(np.prod(shape)).reshape(shape)
    for values in (rng.integers(0, 3, shape), counting, np.minimum(counting, 5) % 4, np.zeros(shape)):
        table = peers.Table(values.astype(np.int32))
        assert all(int(table[at]) == values[at] for at in np.ndindex(*shape))


def test_splash_attention_with_its_lists_as_constants_is_causal_attention():
    """Its blocks of slots after the diagonal, and before a window, are skipped, and blocks on an edge are masked."""
    q = jax.random.normal(jax.random.key(0), (1, 1024, 2, 128))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 1, 1024, 128))
    for options in ({}, {"window": 700}, {"position": np.array([512])}):
        text = q[:, :512] if "position" in options else q
        with mock.patch.object(pl, "pallas_call", functools.partial(_interpreted, pl.pallas_call)):
            found = PEERS["splash_512"](text, k, v, scale=0.1, **options)
        assert relative_error(found, reference(text, k, v, scale=0.1, **options)) < BOUNDS["float32"], options


@pytest.mark.parametrize("slots", [16, 48])
def test_ragged_paged_attention_reads_the_pages_of_its_table(slots):
    """Its pages are ours, read as keys and values side by side; JAX's own reference tells, since
    its kernel can't be interpreted."""
    B, K, G, page, H, M = 8, 2, 2, 8, 128, 6
    P, length = B * M + 2, np.array([40, 1, 17, 48, 8, 33, 16, 5], np.int32)
    pages = jax.random.normal(jax.random.key(0), (P, K, page, H))
    q = jax.random.normal(jax.random.key(1), (B, 1, K * G, H))
    table = np.random.default_rng(0).permutation(P)[: B * M].reshape(B, M).astype(np.int32)
    given = {}

    def attend(*args, num_kv_pages_per_block, num_queries_per_block, vmem_limit_bytes, **options):
        given.update(pages=num_kv_pages_per_block, queries=num_queries_per_block)
        return ragged_paged_attention.ref_ragged_paged_attention(*args, **options)

    kernel = mock.Mock(__wrapped__=attend)
    with chips.assume("v5e"), mock.patch.object(ragged_paged_attention, "ragged_paged_attention", kernel):
        found = jax_ragged_paged_attention(q, pages, pages, table, length, scale=0.1, slots=slots)
    assert given == {"pages": slots // page, "queries": B}
    both = pages.reshape(P // 2, page, K, 2, H)[table % (P // 2)].reshape(B, M * page, K, 2, H)
    for b, n in enumerate(length):
        k, v = both[b, :n, :, 0], both[b, :n, :, 1]
        scores = jax.nn.softmax(np.einsum("kgh,skh->kgs", q[b, 0].reshape(K, G, H), k) * 0.1)
        expected = np.einsum("kgs,skh->kgh", scores, v).reshape(K * G, H)
        assert relative_error(found[b], expected) < BOUNDS["float32"]


def _interpreted(call, *args, **options):
    return call(*args, **{**options, "interpret": True})
