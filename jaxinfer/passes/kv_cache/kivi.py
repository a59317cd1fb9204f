"""Keys and values in 4 bits but for the newest tokens: a sixth of float32's bytes in long contexts, a small loss."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.kivi import Kivi
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVInt4(CacheOf):
    """Pack tokens in groups: keys with a grid a channel and group, values with one a token and run of channels."""

    name: ClassVar[str] = "kv_int4"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2402.02750",
        degenerate={"residual": 1 << 30},
        bound=0.03,
        changes="cache_bytes",
        takes="cache",
        rounds_activations=True,
    )
    group: int = 32  # tokens that share a channel's grid, and channels of a value that do; 64 for the kernel for TPU
    residual: int = 64  # newest tokens that stay as they are

    def kind(self, node: Attention) -> Kivi:
        """Return the packed cache."""
        return Kivi(bits=4, group=self.group, residual=self.residual)
