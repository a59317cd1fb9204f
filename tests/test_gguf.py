"""GGUF files: what is read from a sound one, and the one line that a damaged one gets."""

import struct

import ml_dtypes
import numpy as np
import pytest
from data import smollm2_gguf
from gguf import GGUFReader, quants
from gguf.constants import GGMLQuantizationType as Type
from gguf_blocks import DECODE, decode, random_blocks
from gguf_files import default_tensors, pack_entry, pack_gguf, pack_string, pack_tensor, write_gguf

from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.checkpoint.gguf_tensors import entries
from jaxinfer.errors import InputError

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


@pytest.mark.parametrize("kind", DECODE, ids=lambda kind: kind.name)
def test_blocks_are_dequantized_as_ggml_defines_them(tmp_path, kind):
    data = random_blocks(kind, rows=3, columns=512)
    path = write_gguf(tmp_path / "a.gguf", tensors={"w": (data, kind)})
    (entry,) = entries(read_header(path), path).values()
    assert (entry.shape, entry.dtype, entry.nbytes) == ((3, 512), kind.name, data.nbytes)
    read = entry.read()
    assert read.dtype == np.float32
    np.testing.assert_allclose(read, decode(kind, data, 512), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [k for k in DECODE if not k.name.endswith("_K")], ids=lambda kind: kind.name)
def test_quantized_numbers_come_back_within_half_a_step(tmp_path, kind):
    numbers = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", tensors={"w": (quants.quantize(numbers, kind), kind)})
    read = entries(read_header(path), path)["w"].read()
    bits = int(kind.name[1])
    blocks = np.abs(numbers.reshape(-1, 32)).max(1, keepdims=True)
    # symmetric formats lose the largest number's mirror image: a whole step at one end
    assert (np.abs(read - numbers).reshape(-1, 32) <= blocks * 2.1 / (2**bits - 1)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_plain_numbers_come_as_stored(tmp_path, dtype):
    numbers = np.random.default_rng(2).normal(size=(2, 3, 5)).astype(dtype)
    stored = (numbers.view(np.uint8), Type.BF16) if dtype is ml_dtypes.bfloat16 else numbers
    path = write_gguf(tmp_path / "a.gguf", tensors={"w": stored, "last": np.ones(3, np.float32)})
    found = entries(read_header(path), path)
    assert found["w"].dtype == np.dtype(dtype).name
    read = found["w"].read()
    assert read.dtype == dtype and read.shape == (2, 3, 5)
    assert read.tobytes() == numbers.tobytes()
    np.testing.assert_array_equal(found["last"].read(), np.ones(3))


@pytest.mark.parametrize("alignment", [None, 32, 128])
def test_header_agrees_with_the_gguf_package(tmp_path, alignment):
    keys = {"test.bool": True, "test.floats": [0.5, -1.5], "test.ints": [1, -2, 3], "test.strings": ["", "é", "漢字"]}
    path = write_gguf(tmp_path / "a.gguf", keys=keys, alignment=alignment)
    header, reader = read_header(path), GGUFReader(path)
    assert header.version == 3 and header.alignment == (alignment or 32)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for key, field in fields.items():
        value = header.metadata[key]
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents(), key
    assert len(header.tensors) == len(reader.tensors) == len(default_tensors())
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.type, info.offset, info.nbytes) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)


def test_every_scalar_type_is_read(tmp_path):
    values = {0: ("B", 250), 1: ("b", -3), 2: ("H", 65000), 3: ("h", -300), 4: ("I", 2**32 - 1), 5: ("i", -(2**31))}
    values |= {6: ("f", 0.5), 7: ("B", 1), 10: ("Q", 2**64 - 1), 11: ("q", -(2**63)), 12: ("d", 1e300)}
    made = [pack_entry(str(kind), kind, struct.pack("<" + form, value)) for kind, (form, value) in values.items()]
    path = tmp_path / "a.gguf"
    path.write_bytes(pack_gguf(made, [], start=b"GGUF\2\0\0\0"))
    header = read_header(path)
    assert header.version == 2
    assert header.metadata == {str(kind): value for kind, (_, value) in values.items()}
    assert header.metadata["7"] is True


NAME = pack_entry("general.architecture", STRING, pack_string("llama"))
ONE = [pack_tensor("w", [16])]
BAD = {
    "empty": (b"", "0 bytes"),
    "not GGUF": (pack_gguf([NAME], ONE, start=b"PK\3\4\3\0\0\0"), "begins with b'PK"),
    "version 1": (pack_gguf([NAME], ONE, start=b"GGUF\1\0\0\0"), "version is 1"),
    "version 4": (pack_gguf([NAME], ONE, start=b"GGUF\4\0\0\0"), "version is 4"),
    "big-endian": (pack_gguf([NAME], ONE, start=b"GGUF\0\0\0\3"), "big-endian"),
    "entry count": (pack_gguf([NAME], ONE, counts=(1, 2**63)), "metadata count is 9223372036854775808"),
    "one entry too many": (pack_gguf([NAME], ONE, counts=(1, 2)), "tensor '' has 0 dimensions"),
    "tensor count": (pack_gguf([NAME], ONE, counts=(2**40, 1)), "tensor count is 1099511627776"),
    "key length": (pack_gguf([struct.pack("<Q", 2**50)], ONE), "length of key 0"),
    "key not UTF-8": (pack_gguf([pack_entry(b"\xff\xfe", U32, bytes(4))], ONE), "key 0 of the metadata is not UTF-8"),
    "key twice": (pack_gguf([NAME, NAME], ONE), "'general.architecture' is there twice"),
    "value type": (pack_gguf([pack_entry("k", 99, bytes(4))], ONE), "'k' has values of type 99"),
    "element type": (pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQ", 77, 1))], ONE), "'k' has values of type 77"),
    "nested array": (pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQ", 9, 1))], ONE), "'k' has values of type 9"),
    "array length": (pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQ", U32, 2**60))], ONE), "length of .*'k'"),
    "strings count": (pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQ", STRING, 2**60))], ONE), "length of .*'k'"),
    "string in array": (
        pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQQ", STRING, 1, 2**63))], ONE),
        "string 0 of metadata key 'k'",
    ),
    "array not UTF-8": (
        pack_gguf([pack_entry("k", ARRAY, struct.pack("<IQ", STRING, 1) + pack_string(b"a\xff"))], ONE),
        "string 0 of metadata key 'k' is not UTF-8 at its byte 1",
    ),
    "bool": (pack_gguf([pack_entry("k", BOOL, b"\2")], ONE), "'k' holds 2 where a bool"),
    "alignment 0": (pack_gguf([pack_entry("general.alignment", U32, bytes(4))], ONE), "'general.alignment' is 0"),
    "alignment 24": (pack_gguf([pack_entry("general.alignment", U32, b"\x18\0\0\0")], ONE), "power of two"),
    "alignment float": (pack_gguf([pack_entry("general.alignment", F32, bytes(4))], ONE), "'general.alignment' is 0.0"),
    "no dimension": (pack_gguf([NAME], [pack_tensor("w", [])]), "'w' has 0 dimensions"),
    "five dimensions": (pack_gguf([NAME], [pack_tensor("w", [1] * 5)]), "'w' has 5 dimensions"),
    "dimension 0": (pack_gguf([NAME], [pack_tensor("w", [0, 3])]), r"'w' has the shape \(3, 0\)"),
    "overflow": (pack_gguf([NAME], [pack_tensor("w", [2**32, 2**32, 2**32])]), "'w' of shape .* bytes, the file"),
    "tensor type": (pack_gguf([NAME], [pack_tensor("w", [16], kind=5)]), "'w' has the unknown type 5"),
    "part of a block": (pack_gguf([NAME], [pack_tensor("w", [16], kind=8)]), "rows of 16 values, and Q8_0"),
    "misaligned": (pack_gguf([NAME], [pack_tensor("w", [4], offset=8)]), "offset 8, not a multiple"),
    "outside": (pack_gguf([NAME], [pack_tensor("w", [16], offset=2**62)]), "ends at byte 4611686018427388096"),
    "past the end": (pack_gguf([NAME], [pack_tensor("w", [16], offset=32)]), "'w' ends at byte"),
    "tensor twice": (pack_gguf([NAME], ONE * 2), "'w' is there twice"),
    "overlap": (pack_gguf([NAME], [*ONE, pack_tensor("v", [8], offset=32)]), "'v' begins inside tensor 'w'"),
    "newline": (pack_gguf([pack_entry("a\nb", 99, bytes(4))], ONE), r"'a\\nb' has values"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_gets_one_line(tmp_path, case):
    data, pattern = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InputError, match=pattern) as error:
        read_header(path)
    assert "bad.gguf" in str(error.value) and "\n" not in str(error.value)


def test_every_truncation_is_refused(tmp_path):
    keys = {"test.strings": ["a", "bc"], "test.floats": [1.0, 2.0]}
    path = write_gguf(tmp_path / "a.gguf", keys=keys, tensors={"w": np.ones(8, np.float32)})
    data = path.read_bytes()
    last = max(info.offset + info.nbytes for info in read_header(path).tensors.values())
    for length in range(last):
        path.write_bytes(data[:length])
        with pytest.raises(InputError):
            read_header(path)


def test_missing_file_and_folder_are_refused(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="GGUF file"):
            read_header(path)


def test_unsupported_type_names_the_tensor_and_the_known_types(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tensors={"w": (np.zeros((1, 84), np.uint8), Type.Q2_K)})
    with pytest.raises(InputError, match="'w' is of type Q2_K; convert it to one of F32, F16, BF16, Q8_0, Q4_0"):
        entries(read_header(path), path)


def test_a_file_cut_or_removed_after_opening_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    found = entries(read_header(path), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="ends after the file does"):
        found["blk.0.attn_q.weight"].read()
    path.unlink()
    with pytest.raises(InputError, match="cannot read tensor"):
        found["token_embd.weight"].read()


def test_smollm2_header_is_read_whole():
    path = smollm2_gguf()
    if path is None:
        pytest.skip("no SmolLM2 file: set JAXINFER_SMOLLM2 to its path")
    header = read_header(path)
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152 and len(header.tensors) == 272
