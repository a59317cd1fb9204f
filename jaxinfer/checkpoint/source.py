"""Opening a checkpoint of any supported format: everything but the bytes of its tensors."""

from pathlib import Path

from jaxinfer.checkpoint import gguf, gguf_tensors, hf_config, safetensors_files
from jaxinfer.checkpoint.base import Source
from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.checkpoint.hf_keys import read_json
from jaxinfer.checkpoint.names import gguf_names, hf_names
from jaxinfer.errors import InputError
from jaxinfer.text.gguf_tokenizer import tokenizer_from_gguf
from jaxinfer.text.tokenizer import from_huggingface

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def open_source(path: Path) -> Source:
    """Open a Hugging Face directory, a .safetensors file with config.json beside it, or a GGUF file.

    Raises:
        InputError: the path is missing, damaged, of an unsupported kind, or a pickle (never unpickled).
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_dir() or path.suffix == ".safetensors":
        return _open_hf(path)
    if path.suffix in _PICKLES:
        raise InputError(f"{path}: a pickled checkpoint is never opened, since that can run code; save as safetensors")
    return _open_gguf(path)  # whatever its suffix: the magic bytes decide


def _open_hf(path: Path) -> Source:
    entries = safetensors_files.entries(path)  # first, so that an empty directory is not told to have a config
    directory = path if path.is_dir() else path.parent
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json: it comes with the checkpoint and says what the model is")
    config = hf_config.config_from_hf(read_json(directory / "config.json"), directory / "config.json")
    stop_ids, sampling = hf_config.generation_defaults(directory)
    # Models without a tokenizer are useful (token ids in, logits out); one that is there and broken is an error.
    has_tokenizer = any(
        (directory / f).exists() for f in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    tokenizer = from_huggingface(directory) if has_tokenizer else None
    return Source(path, config, entries, hf_names(config), tokenizer, stop_ids, sampling)


def _open_gguf(path: Path) -> Source:
    header = read_header(path)
    config = gguf.config_from_gguf(header, path)
    tokenizer = tokenizer_from_gguf(header.metadata, path) if "tokenizer.ggml.model" in header.metadata else None
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    stop_ids = tuple(dict.fromkeys(int(header.metadata[k]) for k in keys if k in header.metadata))
    return Source(path, config, gguf_tensors.entries(header, path), gguf_names(config), tokenizer, stop_ids, {})
