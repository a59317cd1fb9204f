"""Keys and values in pages: rows forked from one share what they have in common; as many bytes a token, and a table."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.paged import Paged
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPaged(CacheOf):
    """Keep tokens in pages that each row finds through a table; with `int8=true` as codes, as `kv_int8` does."""

    name: ClassVar[str] = "kv_paged"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2309.06180",
        lossless=True,
        degenerate={"int8": False},
        changes="fork_bytes",
        takes="cache",
    )
    page: int = 64  # tokens; the kernel for TPU takes a multiple of 8 in float32, 16 in bfloat16, 32 in int8
    int8: bool = False  # codes and scales, as kv_int8 has them: half the bytes, and its loss

    def kind(self) -> Paged:
        """Return the cache in pages."""
        return Paged(page=self.page, int8=self.int8)
