"""Keys and values in pages: rows forked from one share what they have in common; as many bytes a token, and a table."""

import dataclasses
from typing import ClassVar

from jaxinfer.cache.kivi import Kivi
from jaxinfer.cache.paged import Paged
from jaxinfer.errors import InputError, nearest
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import About
from jaxinfer.passes.kv_cache.kind import CacheOf

STORES = ("floats", "int8", "int4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPaged(CacheOf):
    """Keep tokens in pages that each row finds through a table: as they are, or stored as `kv_int8` or `kv_int4` do."""

    name: ClassVar[str] = "kv_paged"
    about: ClassVar[About] = About(
        family="kv_cache",
        paper="2309.06180",
        lossless=True,
        degenerate={"store": "floats"},
        forms={"store=int8": 0.005, "store=int4": 0.03},
        changes="fork_bytes",
        takes="cache",
    )
    page: int = (
        64  # tokens; the kernel for TPU takes a multiple of 8 in float32, 16 in bfloat16, 32 in int8, 64 in int4
    )
    store: str = "floats"  # or int8, or int4: in kv_int8's or kv_int4's bytes, at its loss
    group: int = 32  # of int4, as in kv_int4: 64 for the kernel for TPU
    residual: int = 64  # of int4, as in kv_int4: newest tokens that stay as they are, in no page

    def __post_init__(self):
        if self.store not in STORES:
            raise InputError(f"{self.name}:store={self.store!r}: {nearest(self.store, STORES)}")

    def kind(self, node: Attention) -> Kivi | Paged:
        """Return the cache in pages."""
        if self.store == "int4":
            return Kivi(group=self.group, residual=self.residual, page=self.page)
        return Paged(page=self.page, int8=self.store == "int8")
