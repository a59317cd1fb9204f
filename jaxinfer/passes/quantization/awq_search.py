"""AWQ's searches: the factors that protect the inputs of large activations, and the range that each group is cut to."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxinfer.passes.quantization.rounding import decode, encode, scales

LEVELS = {"int4": (-8, 7), "uint4": (0, 15)}  # least and largest code
_SHARES = np.linspace(1.0, 0.5, 11, dtype=np.float32)  # of a group's range, that its search tries
Grid = tuple[Float[Array, "*O G"], Float[Array, "*O G"] | None]


def search_factors(
    mean_abs: Float[Array, "*E C"],
    kernels: Sequence[tuple[Float[Array, "... I"], Float[Array, "... I I"]]],
    groups: Sequence[int],
    qtype: str,
    steps: int = 20,
    spread: Callable[[Array], Array] = lambda factors: factors,
) -> tuple[Float[Array, "*E C"], Float[Array, "*E"], Float[Array, "S *E"]]:
    """Return the factors that lose least, their exponents, and the loss at each of `steps + 1` exponents from 0 to 1.

    `s = mean|x|^alpha`, over the geometric mean of its extremes. The loss is `tr(D H D^T)` summed over the kernels that
    read x, `[O, I]` or `[E, O, I]`, each with its inputs' second moments H, for `D = W - round(W s) / s`, rounded to
    nearest in `groups`. `spread` turns factors of channels into factors of the kernels' inputs. Where `mean_abs` has a
    leading axis (of experts), each has its own exponent. (2306.00978)
    """

    def factors(alpha: Array) -> Array:
        s = jnp.maximum(mean_abs, 1e-4 * mean_abs.max(axis=-1, keepdims=True) + 1e-30) ** alpha
        return s / jnp.sqrt(s.max(axis=-1, keepdims=True) * s.min(axis=-1, keepdims=True))

    def loss(alpha: Array) -> Array:
        s, total = spread(factors(alpha)), jnp.zeros(mean_abs.shape[:-1])
        for (w, hessian), group in zip(kernels, groups, strict=True):
            wide = s[..., None, :]
            scaled = w.astype(jnp.float32) * wide
            grid = scales(scaled, qtype, group)
            d = w - decode(encode(scaled, *grid, qtype), *grid, qtype) / wide
            lost = ((d @ hessian) * d).sum(axis=(-2, -1))
            total = total + lost.reshape(*total.shape, -1).sum(axis=-1)
        return total

    exponents = jnp.linspace(0.0, 1.0, steps + 1)
    losses = jax.lax.map(loss, exponents)
    best = exponents[losses.argmin(axis=0)]
    return factors(best[..., None]), best, losses


def search_range(w: Float[Array, "*E O I"], hessian: Float[Array, "*E I I"], qtype: str, group: int) -> Grid:
    """Return each group's scale (and offset) that loses least at the layer's output, of those tried.

    A group's loss is `d H_g d^T` for its errors d and the second moments H_g of its own inputs. The range is cut to a
    share of its extent; without an offset the scale has either sign, since codes go to -8 on one side and 7 on the
    other.
    """
    count = w.shape[-1] // group
    blocks = hessian.reshape(*hessian.shape[:-2], count, group, count, group)
    blocks = jnp.moveaxis(jnp.diagonal(blocks, axis1=-4, axis2=-2), -1, -3)  # [*E, G, group, group]
    scale, offset = scales(w, qtype, group)

    def at(share: Array) -> Grid:
        if offset is None:
            return scale * share, None
        return scale * share, offset + 7.5 * scale * (1 - share)  # the same middle

    def loss(share: Array) -> Array:
        grid = at(share)
        d = (decode(nearest(w, *grid, qtype), *grid, qtype) - w).reshape(*w.shape[:-1], count, group)
        return (jnp.einsum("...ogi,...gij->...ogj", d, blocks) * d).sum(axis=-1)

    shares = jnp.asarray(_SHARES if offset is not None else np.concatenate([_SHARES, -_SHARES]))
    return at(shares[jax.lax.map(loss, shares).argmin(axis=0)])


def nearest(
    w: Float[Array, "*O I"], scale: Float[Array, "*O G"], offset: Float[Array, "*O G"] | None, qtype: str
) -> Int[Array, "*O I"]:
    """Return the nearest of all 16 codes: `encode` leaves -8 out, which a scale of max |w| / 7 never needs."""
    g = w.astype(jnp.float32).reshape(*scale.shape, -1)
    g = (g if offset is None else g - offset[..., None]) / scale[..., None]
    return jnp.clip(jnp.round(g), *LEVELS[qtype]).astype(jnp.int8).reshape(w.shape)
