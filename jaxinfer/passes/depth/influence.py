"""How much each layer changes what passes through it, on a text (ShortGPT, 2403.03853)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from tqdm import tqdm

from jaxinfer.models.transformer import Transformer
from jaxinfer.passes.calibration import Calibration, forward


def block_influence(model: Transformer, calibration: Calibration) -> list[float]:
    """Return `1 - mean over tokens of cos(x, layer(x))` of every layer: 0 where it changes no direction, 2 at most."""
    embed = jax.jit(lambda embed, tokens: embed(tokens))
    hidden = [embed(model.embed, part) for part in calibration.batches()]
    tokens, found = calibration.tokens.size, []
    for layer in tqdm(model.layers, desc="influence", unit="layer", disable=not calibration.progress):
        sums = [_through(layer, x) for x in hidden]
        hidden = [y for y, _ in sums]
        found.append(1 - sum(float(total) for _, total in sums) / tokens)
    return found


def cosine(x: Float[Array, "*B D"], y: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Return the cosine of the angle between vectors, in float32; 0 where one of them is zero."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
    return (x * y).sum(axis=-1) / jnp.maximum(norms, 1e-30)


@jax.jit
def _through(layer: Any, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    y = forward(layer, x)
    return y, cosine(x, y).sum()
