"""Later tokens run fewer layers, by position alone: all rows of a batch save the same, and no K or V is missing.

The paper finetunes the model for it; without, quality falls with every layer that is left out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import Cache
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.passes.base import About, Technique
from jaxinfer.passes.depth.early_exit import ROOT
from jaxinfer.program import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipDecode(Technique):
    """Run all layers up to position `start`, `share` of them from `end` on, and fewer and fewer between the two.

    A token runs the first `warmup` layers and as many of the last ones as are left to it: what it computes on top is
    built on what earlier tokens, which ran more, have computed there.
    """

    name: ClassVar[str] = "skip_decode"
    about: ClassVar[About] = About(
        family="depth",
        paper="2307.02628",
        degenerate={"share": 1.0},
        bound=8.0,
        changes="flops",
        conflicts={"early_exit": ROOT, "skip_decode": ROOT},
    )
    share: float = 0.75  # of the layers, that the last tokens run
    warmup: int = 1  # first layers that every token runs, where its share leaves one more for the end
    start: int = 0  # the position up to which all layers run
    end: int = 128  # the position from which only `share` of them do

    def transform(self, program: Program) -> Program:
        """Put the model's parts under a root that knows which positions run a layer.

        Raises:
            InputError: an option out of its range.
        """
        if not 0 < self.share <= 1:
            raise InputError(f"skip_decode:share={self.share}: must be above 0 and at most 1")
        if not 0 <= self.start < self.end:
            raise InputError(f"skip_decode:start={self.start}, end={self.end}: must be 0 <= start < end")
        if self.warmup < 0:
            raise InputError(f"skip_decode:warmup={self.warmup}: must be 0 or more")
        parts = {name: getattr(program.model, name) for name in Transformer.__dataclass_fields__}
        limits = self.limits(len(program.model.layers), program.config.max_context)
        return program.replace(model=ByPosition(**parts, limits=limits))

    def depth(self, position: int, layers: int) -> int:
        """Return how many of `layers` layers a token at `position` runs: never more than one before it."""
        least = max(1, math.floor(self.share * layers))
        done = min(max((position - self.start) / (self.end - self.start), 0.0), 1.0)
        return math.ceil(layers - (layers - least) * done - 1e-9)

    def limits(self, layers: int, context: int) -> tuple[int | None, ...]:
        """Return below which position each layer runs; None: at every one."""
        warmup = min(self.warmup, max(1, math.floor(self.share * layers)) - 1)
        depths = [self.depth(p, layers) for p in range(min(context, self.end + 1))]
        found: list[int | None] = []
        for i in range(layers):
            runs = sum(i < warmup or i >= layers - (depth - warmup) for depth in depths)
            found.append(None if runs == len(depths) else runs)
        return tuple(found)


@nnx.dataclass
class ByPosition(Transformer):
    """A Transformer whose layer i runs for the tokens at positions below limits[i], and for no later one.

    A token that runs a layer finds every earlier token's keys and values there, since those ran it too.
    """

    limits: tuple[int | None, ...] = nnx.static(kw_only=True)

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        counts: Int[Array, "B"],
        tree: TokenTree | None = None,
        *,
        first: int = 0,
        end: int | None = None,
        after: Sequence[int] = (),
    ) -> tuple[Float[Array, "B T D"], Cache, list[Float[Array, "B T D"]]]:
        """Return the states, as `Transformer.run_layers` does."""
        offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        at = offset if tree is None else tree.depth
        positions = jnp.where(offset < counts[:, None], cache.length[:, None] + at, -1)
        layers, found = list(cache.layers), []
        for i in range(len(self.layers))[first:end]:
            limit, arguments = self.limits[i], (self.layers[i], x, positions, layers[i], cache.length, counts, tree)
            x, layers[i] = _run(*arguments) if limit is None else _run_below(*arguments, jnp.int32(limit))
            if i in after:
                found.append(x)
        return x, Cache(length=cache.length, layers=layers), found


@jax.jit
def _run(block, x, positions, cache, start, counts, tree):
    return block(x, positions, cache, start, counts, tree)


@jax.jit
def _run_below(block, x, positions, cache, start, counts, tree, limit):
    """Run a layer for the tokens below position `limit`; where a step has none, not at all."""
    runs = (positions >= 0) & (positions < limit)

    def run(x, cache):
        if tree is None:  # those that run come first: the others are padding to this layer, and are not cached
            new, cache = block(x, jnp.where(runs, positions, -1), cache, start, runs.sum(axis=1, dtype=jnp.int32), None)
        else:  # nodes are in no such order; what those beyond leave in the cache nobody reads
            new, cache = block(x, positions, cache, start, counts, tree)
        return jnp.where(runs[..., None], new, x), cache

    return jax.lax.cond(runs.any(), run, lambda x, cache: (x, cache), x, cache)
