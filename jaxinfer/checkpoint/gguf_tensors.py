"""The tensors of a GGUF file: as arrays, and those of the plain block formats also as their codes and scales."""

from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize

from jaxinfer.checkpoint.base import Entry
from jaxinfer.checkpoint.gguf_header import Header, TensorInfo
from jaxinfer.errors import InputError
from jaxinfer.ops.quantized import Packed

_PLAIN = {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16), Type.BF16: np.dtype(ml_dtypes.bfloat16)}
_KEPT = {Type.Q8_0: "int8", Type.Q4_0: "int4", Type.Q4_1: "uint4"}  # the `Packed` that each can stay
_BLOCKS = (*_KEPT, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K, Type.Q6_K)


def entries(header: Header, path: str | Path) -> dict[str, Entry]:
    """Return the tensors of the file at `path` by name; nothing is read before an entry's `read()` or `blocks()`.

    Either brings one tensor's bytes into memory. `read()` gives F32, F16 and BF16 as they are stored, the blocks of
    Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K dequantized to float32; `blocks()` gives those of Q8_0, Q4_0 and
    Q4_1 as codes and scales.

    Raises InputError for a tensor of any other type; reading does where the file has been cut or removed since.
    """
    path = Path(path)
    out = {}
    for name, info in header.tensors.items():
        if info.type not in _PLAIN and info.type not in _BLOCKS:
            known = ", ".join(t.name for t in (*_PLAIN, *_BLOCKS))
            raise InputError(f"{path}: tensor {name!r:.80} is of type {info.type.name}; convert it to one of {known}")
        out[name] = Entry(
            name,
            info.shape,
            _PLAIN[info.type].name if info.type in _PLAIN else info.type.name,
            info.nbytes,
            partial(read_tensor, info, path),
            partial(_read_blocks, info, path) if info.type in _KEPT else None,
            _KEPT.get(info.type),
        )
    return out


def read_tensor(info: TensorInfo, path: Path) -> np.ndarray:
    """Return one tensor, its blocks dequantized to float32. Raises InputError where the file was cut or removed."""
    stored = _read_bytes(info, path)
    if info.type in _PLAIN:
        return stored.view(_PLAIN[info.type]).reshape(info.shape)
    with np.errstate(all="ignore"):  # a damaged scale gives inf or nan, which is for the caller to see
        return dequantize(stored.reshape(*info.shape[:-1], -1), info.type).reshape(info.shape)


def _read_blocks(info: TensorInfo, path: Path) -> Packed:
    """Return what the blocks hold, without going through floats; the arrays may be views of one buffer.

    A block is 32 consecutive numbers of a row: a float16 scale (in Q4_1 a float16 minimum too), then the codes.
    Q8_0: `w = scale * code`, of int8. Q4_0: `w = scale * (code - 8)`. Q4_1: `w = scale * code + minimum`.
    """
    rows, (numbers, width) = info.shape[:-1], GGML_QUANT_SIZES[info.type]
    blocks = _read_bytes(info, path).reshape(*rows, info.shape[-1] // numbers, width)
    halves, codes = (2, blocks[..., 4:]) if info.type == Type.Q4_1 else (1, blocks[..., 2:])
    scale, *offset = (blocks[..., 2 * i : 2 * i + 2].view("<f2")[..., 0] for i in range(halves))
    if info.type == Type.Q8_0:
        codes = codes.view(np.int8)
    if info.type == Type.Q4_0:
        codes = codes ^ 0x88  # with its top bit flipped, a nibble n is n - 8 in two's complement
    dtype = np.dtype(np.float32)
    return Packed(codes.reshape(*rows, -1), scale, *(offset or [None]), qtype=_KEPT[info.type], dtype=dtype)


def _read_bytes(info: TensorInfo, path: Path) -> np.ndarray:
    try:
        # read, not mapped: a mapping of a file that is cut later would end the process
        stored = np.fromfile(path, np.uint8, info.nbytes, offset=info.offset)
    except OSError as e:
        raise InputError(f"{path}: cannot read tensor {info.name!r:.80} ({e.strerror}); open the file again") from None
    if stored.nbytes != info.nbytes:
        raise InputError(f"{path}: tensor {info.name!r:.80} ends after the file does, which was cut; download it again")
    return stored
