"""Fuzzing of safetensors files: whatever the bytes, every tensor loads or one InputError says why, in bounded time."""

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.safetensors_files import INDEX, MAX_TOKENS, entries
from jaxinfer.errors import InputError

TENSORS = {
    "model.embed_tokens.weight": ("F32", [4, 3]),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", [2, 3]),
    "model.norm.weight": ("F16", [3]),
    "lm_head.weight": ("F64", [2, 2]),
}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def valid() -> tuple[dict, bytes]:
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape) in TENSORS.items():
        end = at + int(np.prod(shape)) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return header, bytes(range(at))


def pack(header: dict) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


HEADER, DATA = valid()
FILE = pack(HEADER) + DATA
HEADER_END = len(FILE) - len(DATA)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples, since thousands are written; and the whole module stays within 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path_factory.mktemp("fuzz")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1e9, f"peak memory grew by {grown / 1e9:.1f} GB"


def loads_or_refuses(path: Path) -> bool:
    """Return whether every tensor loads; anything but that or a one-line InputError fails the test."""
    try:
        for entry in entries(path).values():
            assert entry.read().shape == entry.shape
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


def fuzz(examples: int):
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=5000, suppress_health_check=checks, database=None)


def check(folder: Path, content: bytes) -> bool:
    (folder / "x.safetensors").write_bytes(content)
    return loads_or_refuses(folder / "x.safetensors")


def test_the_unchanged_file_loads(folder):
    assert check(folder, FILE)


edits = st.lists(
    st.tuples(st.integers(0, HEADER_END - 1), st.sampled_from(["set", "insert", "delete"]), st.integers(0, 255)),
    min_size=1,
    max_size=6,
)


@fuzz(450)
@given(edits)
def test_mutated_header_bytes(folder, edits):
    content = bytearray(FILE)
    for at, kind, value in edits:
        if kind == "set":
            content[at] = value
        elif kind == "insert":
            content.insert(at, value)
        else:
            del content[at]
    check(folder, bytes(content))


@fuzz(150)
@given(st.integers(0, len(FILE) - 1))
def test_truncation_is_refused(folder, size):
    assert not check(folder, FILE[:size])


@fuzz(200)
@given(st.one_of(st.integers(0, len(FILE) + 20), st.integers(0, 2**64 - 1), st.integers(0, 63).map(lambda n: 1 << n)))
def test_lying_header_length(folder, length):
    assert check(folder, length.to_bytes(8, "little") + FILE[8:]) == (length == HEADER_END - 8)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(list(SIZES)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzz(300)
@given(st.sampled_from(list(TENSORS)), st.sampled_from(["dtype", "shape", "data_offsets", None]), json_values)
def test_replaced_header_value(folder, name, key, value):
    header = {other: dict(item) for other, item in HEADER.items()}
    if key is None:
        header[name] = value
    else:
        header[name][key] = value
    check(folder, pack(header) + DATA)


@fuzz(150)
@given(st.dictionaries(st.sampled_from([*TENSORS, "x"]), st.sampled_from(["a", "b", "../a", "", 3]), max_size=5))
def test_mutated_index(folder, weight_map):
    (folder / "a").write_bytes(FILE)
    (folder / "b").write_bytes(pack({"x": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}) + bytes(4))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    loads_or_refuses(folder)


@pytest.mark.parametrize("item", [b'"%07d":""', b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'])
def test_a_header_of_very_many_items_is_bounded(folder, item):
    """Well under the limit of marks a header still parses; above it, it is refused before it is parsed."""
    marks = sum(item.count(mark) for mark in b"[{,:") + 1
    for count, accepted in ((MAX_TOKENS // marks // 50, item.endswith(b"}")), (MAX_TOKENS // marks + 2, False)):
        raw = b"{" + b",".join(item % i for i in range(count)) + b"}"
        (folder / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
        try:
            assert len(entries(folder / "x.safetensors")) == count
            assert accepted
        except InputError as error:
            assert not accepted and "\n" not in str(error)
