"""safetensors files: every malformed one is refused in one line, and reading holds one tensor at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxinfer.checkpoint.safetensors_files import INDEX, entries
from jaxinfer.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
F32 = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.full((4,), 7, np.float32)}


def item(dtype: str, shape: list, begin: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """Write a safetensors file whose header may be any JSON value or raw bytes, and whose length may lie."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def save(path: Path, tensors: dict[str, np.ndarray], names: dict[np.dtype, str] | None = None) -> Path:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = names or {np.dtype(np.float32): "F32"}
    for name, array in tensors.items():
        header[name] = item(names[array.dtype], list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    return write(path, header, data)


def save_shards(directory: Path, shards: dict[str, dict[str, np.ndarray]]) -> dict:
    for shard, tensors in shards.items():
        save(directory / shard, tensors)
    index = {"metadata": {}, "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors}}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_reads_every_float_dtype(tmp_path):
    names = {
        np.dtype(np.float64): "F64",
        np.dtype(np.float32): "F32",
        np.dtype(np.float16): "F16",
        np.dtype(ml_dtypes.bfloat16): "BF16",
    }
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=(3, 5)).astype(dtype) for dtype, name in names.items()}
    tensors["scalar"], tensors["empty"] = np.array(2.5, np.float32), np.zeros((0, 7), np.float32)
    found = entries(save(tmp_path / "x.safetensors", tensors, names))
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (
            array.shape,
            array.dtype.name,
            array.nbytes,
        )
        read = found[name].read()
        assert read.dtype == (np.float32 if name == "F64" else array.dtype)
        np.testing.assert_array_equal(read, array.astype(read.dtype))


def test_agrees_with_the_safetensors_package(tmp_path):
    from safetensors.numpy import save_file

    save_file(F32, tmp_path / "model.safetensors")
    for name, entry in entries(tmp_path).items():
        np.testing.assert_array_equal(entry.read(), F32[name])


def test_reads_shards(tmp_path):
    save_shards(tmp_path, {"one.safetensors": {"a": F32["a"]}, "two.safetensors": {"b": F32["b"]}})
    found = entries(tmp_path)
    for name, array in F32.items():
        np.testing.assert_array_equal(found[name].read(), array)


HALF = item("F32", [4], 0, 16)
MALFORMED = {
    "zero length": (dict(header={}, length=0), "header length is 0"),
    "length over the limit": (
        dict(header={}, length=100_000_001),
        "header length is 100000001, expected 2 to 100000000",
    ),
    "length beyond the file": (dict(header={}, length=4000), "header length is 4000, but only 2 bytes follow"),
    "length into the data": (dict(header={"a": HALF}, data=bytes(16), length=60), "not valid JSON"),
    "not JSON": (dict(header=b"{'a': 1}"), "not valid JSON"),
    "not UTF-8": (dict(header=b'{"\xff": 1}'), "not valid JSON"),
    "not an object": (dict(header=[1, 2]), "a JSON list, expected an object"),
    "deep nesting": (dict(header=b"[" * 100_000), "not valid JSON"),
    "huge number": (dict(header=b'{"a": ' + b"9" * 9000 + b"}"), "not valid JSON"),
    "duplicate name": (dict(header=b'{"a": 1, "a": 1}'), "'a' twice"),
    "item is no object": (dict(header={"a": 3}), "tensor 'a' is described by 3"),
    "no dtype": (
        dict(header={"a": {"shape": [1], "data_offsets": [0, 4]}}),
        "dtype None; supported: F64, F32, F16, BF16",
    ),
    "unknown dtype": (dict(header={"a": item("F4", [1], 0, 4)}, data=bytes(4)), "dtype 'F4'; supported: F64, F32"),
    "negative size": (dict(header={"a": item("F32", [-1], 0, 4)}, data=bytes(4)), "shape [-1]"),
    "size is a bool": (dict(header={"a": item("F32", [True], 0, 4)}, data=bytes(4)), "shape [True]"),
    "size is a float": (dict(header={"a": item("F32", [1.0], 0, 4)}, data=bytes(4)), "shape [1.0]"),
    "too many axes": (dict(header={"a": item("F32", [1] * 17, 0, 4)}, data=bytes(4)), "at most 16 sizes"),
    "overflowing product": (dict(header={"a": item("F32", [0, 2**40, 2**40], 0, 0)}), "at most 16 sizes"),
    "shape against bytes": (dict(header={"a": item("F32", [3], 0, 16)}, data=bytes(16)), "has 16 bytes, but F32"),
    "dtype against bytes": (dict(header={"a": item("F16", [4], 0, 16)}, data=bytes(16)), "needs 8"),
    "offsets reversed": (dict(header={"a": item("F32", [4], 16, 0)}, data=bytes(16)), "has -16 bytes"),
    "one offset": (dict(header={"a": {**HALF, "data_offsets": [0]}}, data=bytes(16)), "data_offsets [0]"),
    "negative offset": (dict(header={"a": item("F32", [4], -16, 0)}, data=bytes(16)), "data_offsets [-16, 0]"),
    "overlap": (dict(header={"a": HALF, "b": item("F32", [4], 8, 24)}, data=bytes(24)), "'b' overlaps"),
    "gap": (dict(header={"a": HALF, "b": item("F32", [4], 20, 36)}, data=bytes(36)), "'b' leaves a gap"),
    "data cut": (dict(header={"a": HALF}, data=bytes(15)), "end at byte 16 of the data, but 15 bytes"),
    "data too long": (dict(header={"a": HALF}, data=bytes(17)), "end at byte 16 of the data, but 17 bytes"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_in_one_line(case, tmp_path):
    options, expected = MALFORMED[case]
    path = write(tmp_path / "model.safetensors", **options)
    with pytest.raises(InputError) as error:
        entries(tmp_path)
    assert expected in str(error.value)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_tensor_of_integers_is_refused_when_read(tmp_path):
    for dtype, size in (("I64", 8), ("BOOL", 1), ("F8_E4M3", 1)):
        found = entries(write(tmp_path / "x.safetensors", {"ids": item(dtype, [2], 0, 2 * size)}, bytes(2 * size)))
        with pytest.raises(InputError, match=f"'ids' has dtype {dtype}; weights of F64, F32, F16, BF16 are supported"):
            found["ids"].read()


def test_short_and_missing_files(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"1234")
    with pytest.raises(InputError, match="has 4 bytes, a safetensors file at least 8"):
        entries(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="No such file"):
        entries(tmp_path / "absent.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"is empty, expected model\.safetensors"):
        entries(tmp_path / "empty")
    with pytest.raises(InputError, match=r"has x\.safetensors but neither"):
        entries(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickles_are_refused_unread(name, tmp_path):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")  # would run if it were unpickled
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(InputError, match="so are never read"):
            entries(path)
    assert os.listdir(tmp_path) == [name]


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="not a regular file"):
        entries(tmp_path)


def test_file_cut_after_opening(tmp_path):
    path = save(tmp_path / "x.safetensors", F32)
    found = entries(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(InputError, match="'b' ends after the file does"):
        found["b"].read()


BAD_INDEXES = {
    "missing shard": (lambda m: {**m, "c": "three.safetensors"}, "'three.safetensors' does not exist"),
    "tensor not in its shard": (lambda m: {**m, "c": "two.safetensors"}, "'c' is not in its shard two.safetensors"),
    "tensor not in the index": (lambda m: {"a": m["a"], "x": m["b"]}, "'b' is in shard two.safetensors, but the index"),
    "wrong shard": (lambda m: {"a": m["b"], "b": m["a"]}, "the index says"),
    "path to elsewhere": (lambda m: {**m, "c": "../two.safetensors"}, "must be a plain file name"),
    "impossible name": (lambda m: {**m, "c": "x" * 5000}, "does not exist"),
    "not names": (lambda m: {"a": 1}, "weight_map must be an object"),
    "empty": (lambda m: {}, "weight_map must be an object"),
}


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index(case, tmp_path):
    change, expected = BAD_INDEXES[case]
    index = save_shards(tmp_path, {"one.safetensors": {"a": F32["a"]}, "two.safetensors": {"b": F32["b"]}})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": change(index["weight_map"])}))
    with pytest.raises(InputError) as error:
        entries(tmp_path)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_tensor_in_two_shards(tmp_path):
    index = save_shards(tmp_path, {"one.safetensors": F32, "two.safetensors": {**F32, "c": F32["a"]}})
    for shard, expected in (("one", "'a' is in two shards"), ("two", "'a' is in shard one.safetensors, but the index")):
        weight_map = {**index["weight_map"], "a": f"{shard}.safetensors", "b": "one.safetensors"}
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(InputError, match=expected):
            entries(tmp_path)


def test_duplicate_key_in_the_index(tmp_path):
    save(tmp_path / "one.safetensors", F32)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}')
    with pytest.raises(InputError, match="'a' twice"):
        entries(tmp_path)


PEAK = """
import sys
from pathlib import Path
from jaxinfer.checkpoint.safetensors_files import entries

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

found = entries(Path(sys.argv[1]))
found["layer.0"].read().sum()  # warm up whatever numpy allocates once
before = peak()
for entry in found.values():
    entry.read().sum()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
def test_streaming_holds_one_tensor(tmp_path):
    """Read a 200 MB checkpoint in four shards: the peak grows by no more than 1.5 of the largest tensor."""
    rng = np.random.default_rng(0)
    block = rng.normal(size=(2 << 20)).astype(np.float32)  # 8 MB
    shards: dict[str, dict[str, np.ndarray]] = {}
    for i in range(4):
        tensors = {f"layer.{i * 4 + j}": block for j in range(4)}
        tensors[f"wide.{i}"] = np.concatenate([block, block])
        shards[f"shard-{i}.safetensors"] = tensors
    save_shards(tmp_path, shards)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 190e6
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(run.stdout) <= 1.5 * 16 * (1 << 20), f"peak grew by {int(run.stdout) / 1e6:.0f} MB"
