"""Keys and values in 8 bits, one scale a token and head: half of bfloat16's bytes, no loss that shows."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVInt8(CacheOf):
    """Round each head of a token to `max |x| / 127` times -127..127."""

    name: ClassVar[str] = "kv_int8"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2303.06865",
        bound=0.005,
        changes="cache_bytes",
        takes="cache",
        rounds_activations=True,
    )

    def kind(self, node: Attention) -> QuantizedCache:
        """Return the int8 cache."""
        return QuantizedCache(qtype="int8")
