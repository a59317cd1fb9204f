"""The gradient of prefill attention: scores are computed again, a block of queries at a time (2205.14135)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import prefill_attention as kernels
from pallas_kernels import targets
from pallas_kernels.prefill_attention.reference import visible

QUERIES = 128  # of a block of the gradient, which holds its scores with all slots
SCALARS = ("position", "length", "starts")


def prefill_attention(q: Float[Array, "B T N H"], k: Array, v: Array, **options: Any):
    """Return the kernel's `(q, k, v, **options)`, which this gives a gradient with respect to q, k and v.

    Block lists and codes have none: JAX says so where one is asked for.
    """
    kernel = targets.kernel(kernels)
    if options.get("lists") is not None or options.get("k_scale") is not None:
        return kernel(q, k, v, **options)
    scalars = {name: options.pop(name, None) for name in SCALARS}
    known = {name: x for name, x in scalars.items() if isinstance(x, np.ndarray)}
    given = {name: x for name, x in scalars.items() if x is not None and name not in known}
    return_lse = options.pop("return_lse", False)

    @jax.custom_vjp
    def attend(q, k, v, given):
        return kernel(q, k, v, return_lse=return_lse, **known, **given, **options)

    def forward(q, k, v, given):
        out, lse = kernel(q, k, v, return_lse=True, **known, **given, **options)
        return (out, lse) if return_lse else out, (q, k, v, out, lse, given)

    def backward(saved, found):
        q, k, v, out, lse, given = saved
        d_out, d_lse = found if return_lse else (found, jnp.zeros_like(lse))
        words = {name: options.get(name, default) for name, default in (("window", None), ("sinks", 0))}
        seen = functools.partial(_seen, k.shape[2], {**known, **given}, words)
        shapes = dict(scale=options["scale"], softcap=options.get("softcap"))
        grads = gradient(q, k, v, out, lse, d_out, d_lse, seen, **shapes)
        return *grads, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), given)

    attend.defvjp(forward, backward)
    return attend(q, k, v, given)


def _seen(S, scalars, words, first, size, B):
    """Return which slots the queries from `first` on see, `[B, size, S]`."""
    return visible(first + jnp.arange(size), B, S, *(scalars.get(name) for name in SCALARS), **words)


def gradient(q, k, v, out, lse, d_out, d_lse, seen, *, scale, softcap):
    """Return the gradients of q, k and v; `seen(first, size, B)` tells which slots a block of queries sees.

    With P the weights and dP = dO V^T:  dS = P (dP - sum(dO O) + dlse),  dQ = dS K,  dK = dS^T Q,  dV = P^T dO.
    """
    B, T, N, H = q.shape
    K = k.shape[1]
    G, size = N // K, min(QUERIES, T)
    count = -(-T // size)
    rows = count * size

    def blocks(x):
        x = jnp.pad(x, ((0, 0), (0, rows - T)) + ((0, 0),) * (x.ndim - 2))
        x = x.reshape(B, count, size, K, G, *x.shape[3:]).astype(jnp.float32)
        return jnp.moveaxis(x, 1, 0)

    # Rows beyond T: their lse of 0 and d_out of 0 give weights that nothing is multiplied with but zeros.
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
    dot = functools.partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)

    def step(sums, block):
        first, q, d_out, lse, delta = block
        raw = dot("btkgh,bksh->bkgts", q, keys) * scale
        capped = raw if softcap is None else softcap * jnp.tanh(raw / softcap)
        mask = seen(first, size, B) & (first + jnp.arange(size) < T)[None, :, None]
        weights = jnp.where(mask[:, None, None], jnp.exp(capped - lse.transpose(0, 2, 3, 1)[..., None]), 0)
        d_values = dot("bkgts,btkgh->bksh", weights, d_out)
        d_scores = weights * (dot("btkgh,bksh->bkgts", d_out, values) - delta.transpose(0, 2, 3, 1)[..., None])
        if softcap is not None:
            d_scores *= 1 - (capped / softcap) ** 2
        d_scores *= scale
        d_keys = dot("bkgts,btkgh->bksh", d_scores, q)
        return (sums[0] + d_keys, sums[1] + d_values), dot("bkgts,bksh->btkgh", d_scores, keys)

    each = (jnp.arange(count) * size, *(blocks(x) for x in (q, d_out, jnp.where(lse == -jnp.inf, 0, lse), delta)))
    (d_keys, d_values), d_queries = jax.lax.scan(step, (jnp.zeros_like(keys), jnp.zeros_like(values)), each)
    d_queries = jnp.moveaxis(d_queries, 0, 1).reshape(B, rows, N, H)[:, :T]
    return d_queries.astype(q.dtype), d_keys.astype(k.dtype), d_values.astype(v.dtype)
