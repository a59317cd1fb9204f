"""Fuzzing of GGUF files: whatever the bytes, all of it loads or one InputError says why, in bounded time and memory."""

import resource
import struct
from pathlib import Path

import pytest
from gguf_files import default_tensors, pack_entry, pack_gguf, pack_string, pack_tensor, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxinfer.checkpoint.gguf import config_from_gguf
from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.checkpoint.gguf_tensors import entries
from jaxinfer.errors import InputError
from jaxinfer.text.gguf_tokenizer import tokenizer_from_gguf

KEYS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", "a", "b", "ab", "Ġ", "é"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 4],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "test.floats": [0.5, 1.5],
}
EXTREMES = [0, 1, 2, 3, 5, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]
fuzz = settings(
    max_examples=400, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples, since thousands are written; and the whole module stays within 1 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield tmp_path_factory.mktemp("fuzz")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1e9, f"peak memory grew by {grown / 1e9:.1f} GB"


@pytest.fixture(scope="module")
def sound(folder) -> tuple[bytes, int]:
    """Return the bytes of a file that loads, and where its data begin."""
    path = write_gguf(folder / "sound.gguf", keys=KEYS, tensors=default_tensors())
    assert loads_or_refuses(path)
    return path.read_bytes(), min(info.offset for info in read_header(path).tensors.values())


def loads_or_refuses(path: Path) -> bool:
    """Return whether all of the file loads; anything but that or a one-line InputError fails the test."""
    try:
        header = read_header(path)
        config_from_gguf(header, path)
        for entry in entries(header, path).values():
            assert entry.read().shape == entry.shape
        if "tokenizer.ggml.model" in header.metadata:
            tokenizer_from_gguf(header.metadata, path).encode("ab é a")
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return False
    return True


def check(folder: Path, data: bytes) -> bool:
    path = folder / "case.gguf"
    path.write_bytes(data)
    return loads_or_refuses(path)


@fuzz
@given(changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes(folder, sound, changes):
    data, end = bytearray(sound[0]), sound[1]
    for where, byte in changes:
        data[int(where * (end - 1))] = byte
    check(folder, bytes(data))


@fuzz
@given(where=st.floats(0, 1), width=st.sampled_from([4, 8]), value=st.sampled_from(EXTREMES))
def test_lying_numbers(folder, sound, where, width, value):
    """Any aligned-looking number of the header becomes an extreme one."""
    data, end = bytearray(sound[0]), sound[1]
    at = int(where * (end - width))
    data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
    check(folder, bytes(data))


def test_every_number_of_the_header_made_huge(folder, sound):
    """The same, at every byte of the header: no length, count, type, dimension or offset is left out."""
    data, end = sound
    for at in range(4, end - 8):
        for value in (2**64 - 1, 2**61):
            check(folder, data[:at] + value.to_bytes(8, "little") + data[at + 8 :])


@fuzz
@given(length=st.floats(0, 1), extra=st.binary(max_size=8))
def test_truncations(folder, sound, length, extra):
    data = sound[0]
    cut = data[: int(length * (len(data) - 1 - len(extra)))] + extra
    assert not check(folder, cut)


@fuzz
@given(piece=st.tuples(st.floats(0, 1), st.integers(0, 64)), target=st.floats(0, 1), insert=st.booleans())
def test_moved_and_repeated_pieces(folder, sound, piece, target, insert):
    data, end = sound
    at, to = int(piece[0] * end), int(target * end)
    chunk = data[at : at + piece[1]]
    check(folder, data[:to] + chunk + data[to + (0 if insert else len(chunk)) :])


ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3"]
SUFFIXES = [
    *("embedding_length", "block_count", "context_length", "feed_forward_length", "attention.head_count"),
    *("attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "rope.freq_base"),
    *("rope.scaling.type", "rope.scaling.factor", "attention.sliding_window", "attention.sliding_window_pattern"),
    *("expert_count", "expert_used_count", "expert_feed_forward_length", "rope.dimension_count"),
]
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, 64, 2**31, 2**32 - 1]).map(lambda n: (4, struct.pack("<I", n))),
    st.integers(-(2**63), 2**63 - 1).map(lambda n: (11, struct.pack("<q", n))),
    st.floats(width=32).map(lambda x: (6, struct.pack("<f", x))),
    st.booleans().map(lambda b: (7, bytes([b]))),
    st.sampled_from(["", "linear", "yarn", "none", "é\n"]).map(lambda s: (8, pack_string(s))),
    st.lists(st.integers(0, 9), max_size=3).map(lambda v: (9, struct.pack(f"<IQ{len(v)}I", 4, len(v), *v))),
)
GOOD = {"embedding_length": 16, "block_count": 1, "context_length": 8, "feed_forward_length": 8}
GOOD |= {"attention.head_count": 2, "attention.sliding_window": 4, "expert_count": 2, "expert_used_count": 1}


@fuzz
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    changed=st.dictionaries(st.sampled_from(SUFFIXES), VALUES, max_size=3),
    dims=st.lists(st.sampled_from([1, 2, 16, 32, 256, 2**32, 2**63]), min_size=1, max_size=5),
    kind=st.integers(0, 45),
    offset=st.sampled_from([0, 32, 64, 96, 2**63]),
)
def test_any_values_in_a_well_formed_header(folder, architecture, changed, dims, kind, offset):
    values = {key: (4, struct.pack("<I", n)) for key, n in GOOD.items()}
    values["attention.layer_norm_rms_epsilon"] = (6, struct.pack("<f", 1e-5))
    made = [pack_entry("general.architecture", 8, pack_string(architecture))]
    made += [pack_entry(f"{architecture}.{key}", *value) for key, value in {**values, **changed}.items()]
    tensors = [pack_tensor("token_embd.weight", [16, 3]), pack_tensor("w", dims, kind, 192 + offset)]
    check(folder, pack_gguf(made, tensors, bytes(2048)))
