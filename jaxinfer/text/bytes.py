"""A tokenizer of bytes, for models with random weights: text goes through them with nothing to download."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer.text.tokenizer import Tokenizer

VOCAB_SIZE = 256
_CHAT = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token a byte, no special tokens, and a plain chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_template=_CHAT)
