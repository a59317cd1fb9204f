"""A chain of drafted tokens, each drawn after the one before it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxinfer.decode.base import State


def draw_chain(
    logits: Float[Array, "B V"],
    feed: Callable[[Any, Int[Array, "B"], Int[Array, ""]], tuple[Float[Array, "B V"], Any]],
    carry: Any,
    state: State,
    keys: Key[Array, "B"],
    width: Int[Array, ""],
    length: int,
    laws: bool,
) -> tuple[Int[Array, "B g"], Float[Array, "B g V"] | None, Any]:
    """Return `width` >= 1 tokens in room for `length`, the laws that they were drawn from if wanted, and the carry.

    The first is drawn from `logits`; `feed(carry, token i - 1, i)` gives the logits of token i. By the state's own
    sampling: with `laws` by chance of its own, and otherwise as the target will draw at these places.
    """
    B, rows, sampling = len(logits), jnp.arange(len(logits)), state.sampling

    def draw(logits, seen, i):
        logits = sampling.adjust(logits, seen)
        if laws:
            own_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
            token = jax.vmap(jax.random.categorical)(own_keys, logits).astype(jnp.int32)
        else:
            token = sampling.pick(logits, state.rng, state.emitted + i)
        law = jax.nn.softmax(logits, axis=1) if laws else None
        return token, law, None if seen is None else seen.at[rows, token].set(True)

    def put(store, new, i):
        return None if store is None else jax.lax.dynamic_update_index_in_dim(store, new, i, axis=1)

    token, law, seen = draw(logits, state.seen, jnp.int32(0))
    tokens = put(jnp.zeros((B, length), jnp.int32), token, 0)
    found = put(jnp.zeros((B, length, logits.shape[1])), law, 0) if laws else None

    def more(i, c):
        token, seen, tokens, found, carry = c
        logits, carry = feed(carry, token, i)
        token, law, seen = draw(logits, seen, i)
        return token, seen, put(tokens, token, i), put(found, law, i), carry

    _, _, tokens, found, carry = jax.lax.fori_loop(1, width, more, (token, seen, tokens, found, carry))
    return tokens, found, carry
