"""Pages on a mesh: a pool for each device's rows, forks and joins of rows wherever they lie, and what is counted."""

import pytest
from meshes import lines
from models import tiny_config
from test_plan_compiled import small
from tpu import needs_libtpu

from jaxinfer.plan.building import abstract_mesh, build
from jaxinfer.plan.counts import count
from jaxinfer.plan.planning import plan
from jaxinfer.plan.request import Request
from jaxinfer.sharding.specs import shard_bytes

INT4 = "kv_paged:page=16,store=int4,group=8,residual=8"


def test_branches_write_on_a_mesh_what_they_write_on_one_device():
    """Of one row that all devices have, of rows that stay on their devices or don't, of more rows than divide."""
    found = [line for line in lines("mesh_pages.py") if "fork" in line]
    assert len(found) == 10 and all(line["same"] for line in found), found
    assert all(len({t for row in line["tokens"] for t in row}) > 8 for line in found)


def test_branches_that_stay_on_their_devices_share_their_pages_and_none_is_moved():
    """A device has pages of two of four rows; each of its four branches adds those that its own tokens may need."""
    found = {line["cache"]: line["held"] for line in lines("mesh_pages.py") if "held" in line}
    page, table = 8 * 2 * 16 * 4, 32 * 4  # tokens, keys and values, channels of the one head, bytes
    assert found["dense"]["bytes"] == [2 * 32 * page, 4 * 32 * page]
    pages = 1 + 2 * 32
    assert found["kv_paged"]["bytes"] == [pages * page + 2 * table, (pages + 4 * (8 + 1)) * page + 4 * table]
    for held in found.values():
        fork, step = held["moved"]
        assert held["stays"] and max(size for _, size in fork) <= 8 * 4, held  # lengths
        assert {kind for kind, _ in step} == {"all-reduce"}, held  # products' sums, and nothing of a cache


@pytest.mark.parametrize("mesh", [{"data": 2, "model": 2}, {"data": 4}, {"stage": 2, "data": 2}], ids=str)
@pytest.mark.parametrize(("spec", "like"), [("kv_paged:page=16", None), (INT4, "kv_int4:group=8,residual=8")])
def test_a_plan_counts_pages_as_it_counts_rows(spec, like, mesh):
    """Of four devices each holds a quarter and a page of no row, and reads the tokens that are there."""
    config = tiny_config(windows=())
    one, many, rows = (
        build(config, "float32", [s] if s else [], abstract_mesh(m))
        for s, m in ((spec, {"data": 1}), (spec, mesh), (like, mesh))
    )
    assert shard_bytes(*many.cache(4, 512)) == pytest.approx(shard_bytes(*one.cache(4, 512)) / 4, rel=0.04)
    assert count(many, 4, 1, 299).cache_bytes == pytest.approx(count(rows, 4, 1, 299).cache_bytes, rel=0.04)
    assert count(many, 4, 1, 299).cache_bytes < 0.65 * count(many, 4, 1, 510).cache_bytes


@pytest.mark.parametrize("topology", ["cpu:4", pytest.param("v5e:2x2", marks=needs_libtpu)])
def test_pages_are_compiled_for_a_mesh(topology, tmp_path):
    """A cache that is changed in place; on TPUs by the kernel, one a layer, on each chip's own pool."""
    asked = Request(
        model=small(tmp_path, hidden_size=512, intermediate_size=1024, head_dim=128, vocab_size=1024),
        topology=topology, mesh="data=2,model=2", batch=4, context=512, passes=("kv_paged",), phases=("decode",),
    )  # fmt: skip
    found = plan(asked)
    phase = found.phases["decode"]
    assert phase.error is None
    assert phase.compiled.cache == pytest.approx(shard_bytes(*found.target.built.cache(4, 512)), rel=0.01)
    if topology.startswith("v5e"):
        assert dict(phase.compiled.kernels) == {"paged_decode_attention": 4}
