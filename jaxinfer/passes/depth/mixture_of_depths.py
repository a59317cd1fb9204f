"""A model whose every second block is a mixture of depths, ready to be trained, and the way from training to sampling.

Routers have to be trained, so this is no pass: what it gives computes what the model computes, until they are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.errors import InputError
from jaxinfer.models.layers import Linear
from jaxinfer.models.mixture_of_depths import MixtureOfDepths, Routing
from jaxinfer.models.transformer import Transformer
from jaxinfer.tree import replace, rewrite


def with_mixture_of_depths(model: Transformer, capacity: float = 0.125, every: int = 2) -> Transformer:
    """Return the model with layers every - 1, 2 * every - 1, ... as mixtures of depths that take by `top_k`.

    Gates begin at one, and predictors that let every token through: `routed(..., "causal")` of it is the model itself.

    Raises:
        InputError: a capacity outside (0, 1], or a distance below 1 or above the number of layers.
    """
    if not 0 < capacity <= 1:
        raise InputError(f"capacity={capacity}: must be above 0 and at most 1")
    if not 1 <= every <= len(model.layers):
        raise InputError(f"every={every}: must be in 1..{len(model.layers)}, the number of layers")

    def score(bias: float) -> Linear:
        kernel = jnp.zeros((model.config.embed_dim, 1), jnp.float32)
        return Linear(kernel, bias=jnp.full((1,), bias), eq="btd,de->bte", axes=("embed", "router"))

    layers = [
        MixtureOfDepths(block, score(1.0), score(0.0), capacity=capacity, routing="top_k")
        if (i + 1) % every == 0
        else block
        for i, block in enumerate(model.layers)
    ]
    return replace(model, layers=layers)


def routed(model: Transformer, routing: Routing) -> Transformer:
    """Return the model with all its mixtures of depths routed by `top_k` (training) or `causal` (sampling)."""
    return rewrite(model, MixtureOfDepths, ".*", lambda node: node.routed(routing))


def predictor_loss(model: Transformer, tokens: Int[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the predictors' mean loss on whole sequences, and their mean accuracy; see `MixtureOfDepths`."""
    B, T = tokens.shape
    x, cache = model.embed(tokens), model.init_cache(B, T)
    counts, found = jnp.full((B,), T, jnp.int32), []
    for i, layer in enumerate(model.layers):
        if isinstance(layer, MixtureOfDepths):
            found.append(layer.predictor_loss(x))
        x, cache, _ = model.run_layers(x, cache, counts, first=i, end=i + 1)
    losses, hits = zip(*found, strict=True)
    return jnp.stack(losses).mean(), jnp.stack(hits).mean()
