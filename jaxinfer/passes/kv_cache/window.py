"""Only the first tokens and the newest ones stay: a cache that does not grow with the context, and forgets."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.streaming import Streaming
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVWindow(CacheOf):
    """Keep the first `sinks` tokens and the newest `window`; what lies between is let go (StreamingLLM)."""

    name: ClassVar[str] = "kv_window"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2309.17453",
        degenerate={"window": 1 << 30},
        bound=0.05,
        changes="cache_bytes",
        takes="cache",
    )
    sinks: int = 4  # first tokens, to which attention goes that has nowhere else to go
    window: int = 124  # newest tokens, the query's own among them

    def kind(self, node: Attention) -> Streaming:
        """Return the cache of sinks and newest tokens."""
        return Streaming(sinks=self.sinks, window=self.window, rope=node.rope)
