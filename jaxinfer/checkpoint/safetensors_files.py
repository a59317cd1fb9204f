"""Read safetensors checkpoints: one file, or shards with an index. Headers are checked in full before any tensor.

The format is 8 bytes of header length (little-endian), a JSON header, then the tensors back to back. The header is
parsed here rather than by the safetensors package so that a malformed file gives one clear line, in bounded time and
memory, and so that a tensor's bytes are read into its own array: no mapping of the file outlives the call.
"""

import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.checkpoint.base import Entry
from jaxinfer.errors import InputError

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes of the known dtypes that hold no weights here. A checkpoint may carry such tensors beside its weights (position
# numbers, say), so only reading one is an error.
OTHERS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4}
OTHERS |= {"U64": 8, "I64": 8, "C64": 8}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
MAX_HEADER = 100_000_000  # bytes; the format's own limit
MAX_TOKENS = 1_500_000  # brackets, commas and colons of a header, 12 a tensor: bounds its time and memory once parsed
MAX_RANK = 16
MAX_BYTES = 1 << 56  # of one tensor; keeps every size within what numpy can hold
INDEX = "model.safetensors.index.json"


def entries(path: Path) -> dict[str, Entry]:
    """Return every tensor of the checkpoint at `path`: a .safetensors file, or a directory that holds one or shards.

    Raises:
      InputError: the path holds no safetensors file, or one of its files is malformed; `Entry.read` raises it where
        the file has changed since.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "model.safetensors").exists():
            return _file_entries(path / "model.safetensors")
        if (path / INDEX).exists():
            return _sharded_entries(path / INDEX)
        raise InputError(_nothing_in(path))
    if path.suffix in PICKLES:
        raise InputError(f"{path}: {_no_pickles(path.suffix)}")
    return _file_entries(path)


def _no_pickles(suffix: str) -> str:
    return (
        f"{suffix} files are Python pickles, which can run code when opened and so are never read; convert it to "
        "safetensors, for example with transformers' save_pretrained"
    )


def _nothing_in(directory: Path) -> str:
    try:
        names = sorted(os.listdir(directory))
    except OSError as e:
        return f"{directory}: cannot be listed ({e.strerror}); check its permissions"
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{directory}: has {shards[0]} but neither model.safetensors nor {INDEX}; add the index, or give one file"
        )
    if pickles := [name for name in names if name.endswith(PICKLES)]:
        return f"{directory}: has no safetensors file, only {pickles[0]}: {_no_pickles(Path(pickles[0]).suffix)}"
    what = "is empty" if not names else "has no safetensors file"
    return f"{directory}: {what}, expected model.safetensors or {INDEX}; check that the download is complete"


def _sharded_entries(index: Path) -> dict[str, Entry]:
    with _open(index) as f:
        size = os.fstat(f.fileno()).st_size
        if size > MAX_HEADER:
            raise InputError(f"{index}: has {size} bytes, an index has at most {MAX_HEADER}; fetch the file again")
        parsed = _parse_json(f.read(MAX_HEADER), index, "the index")
    weight_map = parsed.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(s, str) for s in weight_map.values()):
        raise InputError(f"{index}: weight_map must be an object of tensor name to file name; fetch the file again")
    found: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        # A name with a directory in it could reach files outside the checkpoint.
        if shard != os.path.basename(shard) or shard in ("", ".", ".."):
            raise InputError(
                f"{index}: shard {shard!r:.200} must be a plain file name beside the index; correct the index"
            )
        if not os.path.exists(index.parent / shard):  # unlike Path.exists, takes impossible names too
            raise InputError(f"{index}: shard {shard!r:.200} does not exist; every shard must: fetch the missing file")
        for name, entry in _file_entries(index.parent / shard).items():
            if name in found:
                raise InputError(
                    f"{index}: tensor {name!r:.200} is in two shards, one of them {shard}; fetch them again"
                )
            if weight_map.get(name) != shard:
                listed = f"says {weight_map[name]!r:.200}" if name in weight_map else "does not list it"
                raise InputError(
                    f"{index}: tensor {name!r:.200} is in shard {shard}, but the index {listed}; index and shards must "
                    "agree: fetch them again"
                )
            found[name] = entry
    for name, shard in weight_map.items():
        if name not in found:
            raise InputError(f"{index}: tensor {name!r:.200} is not in its shard {shard}; fetch that shard again")
    return found


def _file_entries(path: Path) -> dict[str, Entry]:
    with _open(path) as f:
        size = os.fstat(f.fileno()).st_size
        if size < 8:
            raise InputError(
                f"{path}: has {size} bytes, a safetensors file at least 8; it is truncated, fetch it again"
            )
        length = int.from_bytes(f.read(8), "little")
        if not 2 <= length <= MAX_HEADER:
            raise InputError(
                f"{path}: header length is {length}, expected 2 to {MAX_HEADER} bytes; this is no safetensors file, or "
                "a damaged one: fetch it again"
            )
        if 8 + length > size:
            raise InputError(
                f"{path}: header length is {length}, but only {size - 8} bytes follow; the file is truncated: "
                "fetch it again"
            )
        header = _parse_json(f.read(length), path, "the header")
    header.pop("__metadata__", None)
    spans: list[tuple[int, int, str]] = []
    found: dict[str, Entry] = {}
    for name, value in header.items():
        found[name], begin, end = _entry(path, name, value, data_start=8 + length)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            problem = "overlaps the tensor before it" if begin < at else "leaves a gap before it"
            raise InputError(
                f"{path}: tensor {name!r:.200} {problem}: data_offsets begin at {begin}, expected {at}; "
                "fetch the file again"
            )
        at = end
    if at != size - 8 - length:
        raise InputError(
            f"{path}: the tensors end at byte {at} of the data, but {size - 8 - length} bytes are there; "
            "the file is truncated or has bytes added: fetch it again"
        )
    return found


def _entry(path: Path, name: str, value: Any, data_start: int) -> tuple[Entry, int, int]:
    """Check one header item and return it with the span of its bytes in the data."""

    def fail(text: str) -> InputError:
        return InputError(f"{path}: tensor {name!r:.200} {text}")

    if not isinstance(value, dict):
        raise fail(f"is described by {value!r:.200}, expected an object; fetch the file again")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or (dtype not in FLOATS and dtype not in OTHERS):
        raise fail(f"has dtype {dtype!r:.200}; supported: {', '.join(FLOATS)}; fetch the file again")
    # The product is bounded with empty axes left out, since numpy bounds it so too.
    if not _sizes(shape, MAX_RANK) or math.prod(n for n in shape if n) >= MAX_BYTES:
        raise fail(f"has shape {shape!r:.200}, expected a list of at most {MAX_RANK} sizes; fetch the file again")
    if not _sizes(offsets, 2) or len(offsets) != 2:
        raise fail(f"has data_offsets {offsets!r:.200}, expected [begin, end]; fetch the file again")
    begin, end = offsets
    nbytes = math.prod(shape) * (FLOATS[dtype].itemsize if dtype in FLOATS else OTHERS[dtype])
    if nbytes != end - begin:
        raise fail(f"has {end - begin} bytes, but {dtype} of shape {shape!r:.200} needs {nbytes}; fetch the file again")
    stored = FLOATS[dtype].name if dtype in FLOATS else dtype
    entry = Entry(name, tuple(shape), stored, nbytes, _reader(path, name, tuple(shape), dtype, data_start + begin))
    return entry, begin, end


def _sizes(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(n) is int and 0 <= n < MAX_BYTES for n in value)


def _reader(path: Path, name: str, shape: tuple[int, ...], dtype: str, start: int) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if dtype not in FLOATS:
            raise InputError(
                f"{path}: tensor {name!r:.200} has dtype {dtype}; weights of {', '.join(FLOATS)} are supported: "
                "convert the checkpoint to one of these"
            )
        array = np.empty(shape, FLOATS[dtype])
        rest = memoryview(array.reshape(-1).view(np.uint8))
        with _open(path) as f:
            f.seek(start)
            while rest:
                count = f.readinto(rest)  # the system reads at most 2 GiB a call
                if not count:
                    raise InputError(
                        f"{path}: tensor {name!r:.200} ends after the file does; the file was cut, fetch it again"
                    )
                rest = rest[count:]
        with np.errstate(over="ignore"):  # beyond float32's range it becomes infinite, which no model accepts
            return array.astype(np.float32) if dtype == "F64" else array

    return read


def _open(path: Path) -> Any:
    """Open a regular file for unbuffered reading; anything else (a pipe would block) is refused."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: is not a regular file; give a .safetensors file or a directory that holds one")
        return open(path, "rb", buffering=0)
    except (OSError, ValueError) as e:
        if isinstance(e, InputError):
            raise
        reason = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{path}: cannot be read ({reason}); check the path and its permissions") from e


def _parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) != len(pairs):
            seen: set[str] = set()
            name = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{path}: {what} has {name!r:.200} twice, names must be unique; fetch the file again")
        return parsed

    tokens = sum(raw.count(mark) for mark in (b"[", b"{", b",", b":"))
    if tokens > MAX_TOKENS:
        raise InputError(f"{path}: {what} has {tokens} JSON marks, at most {MAX_TOKENS} are read; fetch the file again")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: {what} is not valid JSON ({e!s:.200}); the file is damaged, fetch it again") from e
    if not isinstance(parsed, dict):
        raise InputError(f"{path}: {what} is a JSON {type(parsed).__name__}, expected an object; fetch the file again")
    return parsed
