"""The model of `early_exit`: a token that has left passes the layers above as it is, and leaves its K and V there."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxinfer.cache.base import Cache
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Block, Transformer
from jaxinfer.ops.token_tree import TokenTree
from jaxinfer.passes.depth.criteria import Seen


@nnx.dataclass
class Around(nnx.Module):
    """A layer's cache around another one, for the time of one call."""

    inner: nnx.Module = nnx.data()

    @property
    def exact_rewind(self) -> int | None:
        """What the cache inside has."""
        return self.inner.exact_rewind

    def rewind(self, length: Array) -> "Around":
        """Rewind the cache inside."""
        return type(self)(self.inner.rewind(length))

    def keep(self, start: Array, nodes: Array, counts: Array) -> "Around":
        """Keep a path in the cache inside."""
        return type(self)(self.inner.keep(start, nodes, counts))

    def take(self, rows: Array) -> "Around":
        """Copy rows of the cache inside."""
        return type(self)(self.inner.take(rows))

    def fork(self, rows: Array, length: Array, room: int) -> "Around":
        """Fork rows of the cache inside."""
        return type(self)(self.inner.fork(rows, length, room))


@nnx.dataclass
class Unread(Around):
    """A layer's cache that takes keys and values and is not read: what would read it is never computed."""

    def append(self, k: Array, v: Array, start: Array, counts: Array) -> "Unread":
        """Append to the cache inside."""
        return Unread(self.inner.append(k, v, start, counts))

    def attend(self, q: Array, positions: Array, **options: Any) -> tuple[Array, "Unread"]:
        """Return zeros, for nobody."""
        return jnp.zeros_like(q), self


@nnx.dataclass
class Filled(Around):
    """A layer's cache that holds this chunk's keys and values already: they are not computed again."""

    def append(self, k: Array, v: Array, start: Array, counts: Array) -> "Filled":
        """Nothing to do."""
        return self

    def attend(self, q: Array, positions: Array, **options: Any) -> tuple[Array, "Filled"]:
        """Attend in the cache inside."""
        y, inner = self.inner.attend(q, positions, **options)
        return y, Filled(inner)


class Tokens(NamedTuple):
    """A chunk on its way through the layers."""

    x: Float[Array, "B T D"]
    gone: Bool[Array, "B T"]  # has left, or is padding
    memory: Any  # the criterion's
    depth: Int[Array, "B T"]  # layers run so far; 0 for padding


@nnx.dataclass
class EarlyExit(Transformer):
    """A Transformer whose tokens leave, each for itself, once `criterion` says that they may (CALM, 2207.07061).

    A token that has left keeps its hidden state to the end; the layers above it project that state to their keys and
    values, so that later tokens find some there. A layer that no token of a step needs is not run.
    """

    criterion: nnx.Module = nnx.data(kw_only=True)
    exits: tuple[int, ...] = nnx.static(kw_only=True)  # after how many layers a token may leave

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
        """Return the states of all layers, as `Transformer.run_layers` does.

        Raises:
            InputError: some of the layers are asked for: who has left is known from the first one on.
        """
        if first or end is not None:
            raise InputError(f"layers {first}..{end} of early_exit: its layers run together; leave the pass out")
        x, cache, _, found = self.trace(x, cache, counts, tree, after)
        return x, cache, found

    def trace(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        counts: Int[Array, "B"],
        tree: TokenTree | None = None,
        after: Sequence[int] = (),
    ) -> tuple[Float[Array, "B T D"], Cache, Int[Array, "B T"], list[Float[Array, "B T D"]]]:
        """Return what the layers make of hidden states, the cache, how many layers each token ran, and states."""
        offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        at = offset if tree is None else tree.depth
        positions = jnp.where(offset < counts[:, None], cache.length[:, None] + at, -1)
        gone = positions < 0
        tokens = Tokens(x, gone, self.criterion.start(x.shape[:2]), jnp.zeros_like(positions))
        layers, found = list(cache.layers), []
        head = EarlyExit(**{**{name: getattr(self, name) for name in EarlyExit.__dataclass_fields__}, "layers": []})
        for i, block in enumerate(self.layers):
            tokens, layers[i] = _run(
                head, block, tokens, positions, layers[i], cache.length, counts, tree,
                whole=i < min(self.exits, default=len(self.layers)), exit=i + 1 in self.exits,
            )  # fmt: skip
            if i in after:
                found.append(tokens.x)
        return tokens.x, Cache(length=cache.length, layers=layers), tokens.depth, found


@functools.partial(jax.jit, static_argnames=("whole", "exit"))
def _run(head, block, tokens: Tokens, positions, cache, start, counts, tree, whole: bool, exit: bool):
    """Run a layer for the tokens that are still there, and let those leave that may; `whole`: none has left."""
    x, gone, memory, depth = tokens
    splits = isinstance(block, Block) and not whole
    if splits:  # keys and values of all tokens, whatever they are going to do
        options = (positions, Unread(cache), start, counts, tree)
        cache = block.attention(block.attention_norm(x), *options)[1].inner

    def run(cache, memory):
        if splits:
            new, done = block(x, positions, Filled(cache), start, counts, tree)
            cache = done.inner
        else:
            new, cache = block(x, positions, cache, start, counts, tree)
        new = jnp.where(gone[..., None], x, new)
        out = gone
        if exit:
            seen = Seen(x, new, head.final_norm, head.logits, head.config.vocab_size)
            may, memory = head.criterion.leaves(seen, memory)
            out = gone | may
        return Tokens(new, out, memory, depth + ~gone), cache

    def stay(cache, memory):
        # A cache lets go, when it is read, of what only this chunk needed; cut to its own length it does too.
        return Tokens(x, gone, memory, depth), cache.rewind(start + counts)

    return jax.lax.cond(gone.all(), stay, run, cache, memory) if splits else run(cache, memory)
