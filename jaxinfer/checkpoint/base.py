"""What every checkpoint format is reduced to before a model is assembled from it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxinfer.checkpoint.names import NameTable
from jaxinfer.models.config import ModelConfig
from jaxinfer.ops.quantized import Packed
from jaxinfer.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: its header, and `read()` which brings it (and only it) into host memory."""

    name: str
    shape: tuple[int, ...]  # row-major, the slowest axis first
    dtype: str  # as stored: "float32", "bfloat16", "Q4_1", ...
    nbytes: int  # bytes in the file
    read: Callable[[], np.ndarray]  # float16, bfloat16 or float32; blocks come dequantized to float32
    blocks: Callable[[], Packed] | None = None  # the same in numpy arrays as it is stored, where a model can hold that
    qtype: str | None = None  # and what kind of `Packed` that is


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint: everything but the bytes of its tensors."""

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]
    names: NameTable  # how stored names map to the model's paths
    tokenizer: Tokenizer | None
    stop_ids: tuple[int, ...]  # tokens that end a generation
    sampling: Mapping[str, float]  # the checkpoint's recommended sampling: temperature, top_k, top_p, ...
