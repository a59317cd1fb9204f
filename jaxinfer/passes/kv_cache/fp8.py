"""Keys and values in 8-bit floats: int8's bytes, with steps that follow the magnitude, and more of a loss."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.quantized import QuantizedCache
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVFP8(CacheOf):
    """Round each head of a token to float8_e4m3fn numbers whose largest is `max |x|`."""

    name: ClassVar[str] = "kv_fp8"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2209.05433",
        bound=0.02,
        changes="cache_bytes",
        takes="cache",
        rounds_activations=True,
    )

    def kind(self, node: Attention) -> QuantizedCache:
        """Return the fp8 cache."""
        return QuantizedCache(qtype="float8_e4m3fn")
