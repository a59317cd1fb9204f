"""Small GGUF files for the tests, written with the gguf package."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGMLQuantizationType as Type

SIZES = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 50000.0,
}


def write_gguf(
    path: Path,
    architecture: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | tuple[np.ndarray, Type]] | None = None,
    alignment: int | None = None,
) -> Path:
    """Write a file with `keys` (the tokenizer's and general's in full, others without the architecture's name).

    A key whose value is None is left out. A tensor given with a type holds blocks already.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, value in {**SIZES, **(keys or {})}.items():
        name = key if key.startswith(("tokenizer.", "general.", "test.")) else f"{architecture}.{key}"
        match value:
            case bool():
                writer.add_bool(name, value)
            case int():
                writer.add_uint32(name, value)
            case float():
                writer.add_float32(name, value)
            case str():
                writer.add_string(name, value)
            case list():
                writer.add_array(name, value)
    for name, tensor in (default_tensors() if tensors is None else tensors).items():
        array, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def default_tensors() -> dict[str, np.ndarray | tuple[np.ndarray, Type]]:
    """Return a few tensors: enough for a configuration, not for a model."""
    numbers = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32)
    return {
        "token_embd.weight": numbers,
        "blk.0.attn_norm.weight": numbers[0],
        "blk.0.attn_q.weight": (gguf.quants.quantize(numbers, Type.Q4_1), Type.Q4_1),
    }


def spm_keys(tokenizer_json: Path) -> dict[str, Any]:
    """Return the metadata of a SentencePiece vocabulary: that of a byte-fallback tokenizer.json, scores from merges."""
    model = json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    rank = {"".join(pair): i for i, pair in reversed(list(enumerate(model["merges"])))}
    types = [2 if i == 0 else 3 if i < 3 else 6 if i < 259 else 1 for i in range(len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, len(rank))) for token in tokens],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pack_string(text: str | bytes) -> bytes:
    """Return a string as GGUF stores it."""
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pack_entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """Return one metadata entry."""
    return pack_string(key) + struct.pack("<I", kind) + value


def pack_tensor(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """Return one tensor description; `dims` has the fastest first."""
    return pack_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def pack_gguf(
    entries: list[bytes],
    tensors: list[bytes],
    data: bytes = bytes(64),
    *,
    start: bytes = b"GGUF\3\0\0\0",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """Return a whole file, whose `counts` (of tensors and entries) may be a lie."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = start + struct.pack("<QQ", tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data
