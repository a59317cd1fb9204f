"""Read the header of a GGUF file: its metadata, and where each tensor lies.

A GGUF file is: magic, version, two counts, the metadata (key, type, value), the tensor descriptions (name, shape, type,
offset), padding, data; little-endian throughout. The file is not trusted: every count and length is held against the
bytes that remain before anything is allocated for it, so a damaged header costs no more than the file is long.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from jaxinfer.errors import InputError

# The metadata's value types, by number: 8 is a string, 9 an array, 7 a bool in one byte.
_SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8"}
_SCALARS = {number: np.dtype(name) for number, name in {**_SCALARS, 12: "<f8"}.items()}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DIMS = 4
_LEAST_ENTRY = 8 + 4 + 1  # bytes of the shortest metadata entry: an empty key, its type, one byte of value
_LEAST_TENSOR = 8 + 4 + 8 + 4 + 8  # of the shortest tensor description: an empty name and one dimension
_AGAIN = "the file is damaged or incomplete: download it again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in the file and how it is stored."""

    name: str
    shape: tuple[int, ...]  # row-major: the reverse of the order in the file
    type: GGMLQuantizationType
    offset: int  # from the start of the file
    nbytes: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything in a GGUF file but the tensors' data. Arrays of numbers are numpy arrays, of strings lists."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    alignment: int


def read_header(path: str | Path) -> Header:
    """Return the header of the GGUF file at `path`, versions 2 and 3.

    Raises InputError, naming the file and the key or tensor, for anything that is not a whole and consistent header
    followed by the data that it describes.
    """
    path = Path(path)
    try:
        if not path.is_file() and path.exists():  # a pipe would block
            raise InputError(f"{path} is not a regular file; give the path of a GGUF file")
        size = path.stat().st_size
        with path.open("rb") as file:
            if size < 24:
                raise InputError(f"{path} has {size} bytes, and a GGUF header has at least 24: {_AGAIN}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; give the path of a GGUF file") from None


class _Reader:
    """A position in the file, and what may be read from there."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.size, self.pos = path, data, len(data), 0

    def header(self) -> Header:
        magic = self.data[:4]
        if magic != b"GGUF":
            self.fail(f"it begins with {magic!r}, not b'GGUF'", "give a GGUF file")
        self.pos = 4
        version = self.number("<I", "the version")
        if version and version & 0xFFFF == 0:
            self.fail("it is big-endian", "convert it to little-endian with gguf_convert_endian.py of the gguf package")
        if version not in (2, 3):
            self.fail(f"its version is {version}, and versions 2 and 3 are read", "convert the model again")
        tensor_count, entry_count = self.number("<Q", "the tensor count"), self.number("<Q", "the metadata count")
        self.room(entry_count, _LEAST_ENTRY, "the metadata count")
        self.room(tensor_count, _LEAST_TENSOR, "the tensor count")
        metadata: dict[str, Any] = {}
        for i in range(entry_count):
            key = self.string(f"key {i} of the metadata")
            what = f"metadata key {key[:80]!r}"
            if key in metadata:
                self.fail(f"{what} is there twice", _AGAIN)
            metadata[key] = self.value(what)
        alignment = self.alignment(metadata)
        found = [self.tensor(i) for i in range(tensor_count)]
        start = -(-self.pos // alignment) * alignment
        return Header(version, metadata, self.place(found, start, alignment), alignment)

    def fail(self, problem: str, fix: str) -> NoReturn:
        raise InputError(f"{self.path}: {problem}; {fix}")

    def room(self, count: int, width: int, what: str) -> None:
        """Refuse `count` items of at least `width` bytes where the rest of the file cannot hold them."""
        left = self.size - self.pos
        if count * width > left:
            self.fail(f"{what} is {count}, at {width} bytes or more each, but {left} bytes remain", _AGAIN)

    def number(self, form: str, what: str) -> int:
        self.room(1, struct.calcsize(form), f"the count of numbers in {what}")
        (value,) = struct.unpack_from(form, self.data, self.pos)
        self.pos += struct.calcsize(form)
        return value

    def string(self, what: str) -> str:
        length = self.number("<Q", f"the length of {what}")
        self.room(length, 1, f"the length of {what}")
        raw = self.data[self.pos : self.pos + length]
        self.pos += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as e:
            self.fail(f"{what} is not UTF-8 at its byte {e.start}", _AGAIN)

    def value(self, what: str) -> Any:
        """Return one metadata value: its type comes first."""
        kind = self.number("<I", f"the type of {what}")
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            kind = self.number("<I", f"the element type of {what}")
            count = self.number("<Q", f"the length of {what}")
            if kind == _STRING:
                return self.strings(count, what)
            return self.numbers(kind, count, what)
        return self.numbers(kind, 1, what)[0].item()

    def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
        if kind not in _SCALARS:
            known = ", ".join(map(str, sorted(_SCALARS)))
            self.fail(f"{what} has values of type {kind}; the known types are {known}, 8 (string)", _AGAIN)
        dtype = _SCALARS[kind]
        self.room(count, dtype.itemsize, f"the length of {what}")
        end = self.pos + count * dtype.itemsize
        values = np.frombuffer(self.data[self.pos : end], dtype)
        self.pos = end
        if kind != _BOOL:
            return values
        if values.max(initial=0) > 1:
            self.fail(f"{what} holds {values.max()} where a bool is 0 or 1", _AGAIN)
        return values.astype(bool)

    def strings(self, count: int, what: str) -> list[str]:
        """Return an array of strings. A vocabulary has 10^5 of them, so this loop does without the methods above."""
        self.room(count, 8, f"the length of {what}")
        data, pos, size, length_at = self.data, self.pos, self.size, struct.Struct("<Q").unpack_from
        out = []
        for i in range(count):
            if pos + 8 > size:
                self.fail(f"{what} has {count} strings, but the file ends in string {i}", _AGAIN)
            start = pos + 8
            pos = start + length_at(data, pos)[0]
            if pos > size:
                left = size - start
                self.fail(f"string {i} of {what} is {pos - start} bytes long, but {left} bytes remain", _AGAIN)
            try:
                out.append(data[start:pos].decode())
            except UnicodeDecodeError as e:
                self.fail(f"string {i} of {what} is not UTF-8 at its byte {e.start}", _AGAIN)
        self.pos = pos
        return out

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", 32)
        if type(value) is not int or value < 1 or value & (value - 1):
            self.fail(f"metadata key 'general.alignment' is {value!r:.80}, and it must be a power of two", _AGAIN)
        return value

    def tensor(self, i: int) -> TensorInfo:
        """Return the next tensor's description, its offset still counted from the start of the data."""
        name = self.string(f"the name of tensor {i}")
        what = f"tensor {name[:80]!r}"
        count = self.number("<I", f"the dimensions of {what}")
        if not 1 <= count <= _MAX_DIMS:
            self.fail(f"{what} has {count} dimensions, and there can be 1 to {_MAX_DIMS}", _AGAIN)
        dims = tuple(self.number("<Q", f"the shape of {what}") for _ in range(count))
        kind = self.number("<I", f"the type of {what}")
        offset = self.number("<Q", f"the offset of {what}")
        if kind not in GGML_QUANT_SIZES:
            known = ", ".join(t.name for t in GGML_QUANT_SIZES)
            self.fail(f"{what} has the unknown type {kind}", f"convert the model to one of {known}")
        kind = GGMLQuantizationType(kind)
        block, width = GGML_QUANT_SIZES[kind]
        if min(dims) == 0:
            self.fail(f"{what} has the shape {dims[::-1]}, and no dimension can be 0", _AGAIN)
        if dims[0] % block:
            self.fail(f"{what} has rows of {dims[0]} values, and {kind.name} stores blocks of {block}", _AGAIN)
        nbytes = math.prod(dims) // block * width
        if nbytes > self.size:
            self.fail(f"{what} of shape {dims[::-1]} in {kind.name} has {nbytes} bytes, the file {self.size}", _AGAIN)
        return TensorInfo(name, dims[::-1], kind, offset, nbytes)

    def place(self, found: list[TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
        """Return the tensors by name, with offsets into the file, each inside it and none upon another."""
        tensors: dict[str, TensorInfo] = {}
        for info in found:
            what = f"tensor {info.name[:80]!r}"
            if info.name in tensors:
                self.fail(f"{what} is there twice", _AGAIN)
            if info.offset % alignment:
                self.fail(f"{what} has the offset {info.offset}, not a multiple of the alignment {alignment}", _AGAIN)
            end = start + info.offset + info.nbytes
            if end > self.size:
                self.fail(f"{what} ends at byte {end}, but the file has {self.size} bytes", _AGAIN)
            tensors[info.name] = dataclasses.replace(info, offset=start + info.offset)
        end, before = 0, ""
        for info in sorted(tensors.values(), key=lambda t: t.offset):
            if info.offset < end:
                self.fail(f"tensor {info.name[:80]!r} begins inside tensor {before[:80]!r}", _AGAIN)
            end, before = info.offset + info.nbytes, info.name
        return tensors
