"""What every pass over the cache does: give attention layers another kind of it."""

import dataclasses

from jaxinfer.cache.base import CacheKind
from jaxinfer.cache.dense import Dense
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Attention
from jaxinfer.passes.base import TAKEN, Technique
from jaxinfer.program import Program
from jaxinfer.tree import replace, rewrite


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOf(Technique):
    """A pass that replaces the cache of the attention layers that `where` matches; a subclass says by which."""

    where: str = ".*"  # dotted paths of attention layers: layers.3.attention

    def kind(self, node: Attention) -> CacheKind:
        """Return the kind of cache that a layer gets."""
        raise NotImplementedError

    def transform(self, program: Program) -> Program:
        """Return the program with the layers' caches replaced.

        Raises:
            InputError: a layer has another cache than the plain one already, or `where` matches none.
        """

        def put(node: Attention) -> Attention:
            if node.cache != Dense():
                raise InputError(f"{self.name} over {node.cache}: {TAKEN['cache']}")
            return replace(node, cache=self.kind(node))

        return program.replace(model=rewrite(program.model, Attention, self.where, put))
