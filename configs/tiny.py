"""A Llama of 0.14 M random weights that reads and writes bytes.

Purpose: run every command in seconds, with nothing to download; what it says means nothing.
Command: jaxinfer generate "Hello" --config configs/tiny.py --max-new-tokens 16
Expect:  139,584 parameters, 1,024 bytes of KV cache a token, context 256; the same bytes in every run.
"""

from ml_collections import ConfigDict

from jaxinfer.configuration import defaults


def get_config(argument: str | None = None) -> ConfigDict:
    """Return the config."""
    config = defaults()
    config.dtype = "float32"
    config.architecture = ConfigDict(
        {
            "family": "llama",
            "vocab_size": 256,
            "embed_dim": 64,
            "mlp_dim": 192,
            "num_layers": 2,
            "num_heads": 8,
            "num_kv_heads": 4,
            "head_dim": 16,
            "max_context": 256,
        }
    )
    config.generate.max_new_tokens = 32
    return config
