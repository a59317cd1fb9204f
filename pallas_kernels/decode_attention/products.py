"""The two products of attention with a block of a cache, for all key heads at once, whatever the cache is stored as.

    scores[h] = queries[h] keys[h]^T * key scale,   mixed[h] = (weights[h] * value scale) values[h]

Codes of int8 are multiplied as they are where the chip multiplies integers and the query rows are few: queries and
weights are then integers too, of 16 bits in two bytes, which is finer than bfloat16. To convert the codes instead would
take more time than they save.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import chips, compat
from pallas_kernels.codes import widen

INTEGER_ROWS = 16  # query rows of a head up to which their conversion is cheaper than that of the codes
TOP = 127 * 256 + 127  # the largest integer of two bytes, each signed


def dot(a, b, contract):
    """Return a product accumulated in float32; one of float32 operands is as exact as the chip can make it."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32)


def integer(stored, queries_dtype, rows: int) -> bool:
    """Return whether codes of dtype `stored` are multiplied as integers."""
    fast = chips.current().int8_ratio > 1
    return stored == jnp.int8 and queries_dtype == jnp.bfloat16 and rows <= INTEGER_ROWS and fast


def scratch(heads: int, rows: int, H: int) -> list:
    """Return the scratch of integer products: the queries as bytes, and each row's step."""
    return [compat.VMEM((heads, 2 * rows, H), jnp.int8), compat.VMEM((heads * rows, 128), jnp.float32)]


def prepare(queries, bytes_ref, step_ref) -> None:
    """Write a row's queries, a list of one `[R, H]` a head, as bytes into the scratch."""
    R = queries[0].shape[0]
    for h, q in enumerate(queries):
        q = q.astype(jnp.float32)
        step = jnp.max(jnp.abs(q), axis=1, keepdims=True) / TOP
        bytes_ref[h] = two_bytes(q / jnp.where(step == 0, 1, step))
        step_ref[h * R : (h + 1) * R] = jnp.broadcast_to(step, (R, 128))


def scores(queries, keys, key_scales, prepared=None):
    """Return the scores of a block, `[heads * R, slots]` float32; `key_scales` is a list of `[1, slots]`, or None."""
    each = range(len(keys))
    if prepared is None:
        found = [dot(queries[h], widen(keys[h], queries[h].dtype), ((1,), (1,))) for h in each]
    else:
        bytes_ref, step_ref = prepared
        products = [integer_dot(bytes_ref[h], keys[h], ((1,), (1,))) for h in each]
        found = [joined(p) for p in products]
    if key_scales is not None:
        found = [found[h] * key_scales[h].astype(jnp.float32) for h in each]
    found = jnp.concatenate(found)
    return found if prepared is None else found * step_ref[:, :1]


def mixed(weights, values, value_scales, dtype, alive=None, as_integers=False):
    """Return the weighted values of a block, `[heads * R, H]` float32.

    `weights` is `[heads * R, slots]`, float32, not above 1. Where `alive`, a pair of `[slots, 1]` and `[1, slots]`, is
    false, whatever values and scales hold is not used.
    """
    each = range(len(values))
    R = weights.shape[0] // len(values)
    weights = [weights[h * R : (h + 1) * R] for h in each]
    if value_scales is not None:
        factors = [x.astype(jnp.float32) for x in value_scales]
        if alive is not None:
            factors = [jnp.where(alive[1], x, 0) for x in factors]
        weights = [weights[h] * factors[h] for h in each]
    if as_integers:
        steps = [jnp.max(x, axis=1, keepdims=True) / TOP for x in factors]
        inverse = [1 / jnp.where(x == 0, 1, x) for x in steps]
        parts = [two_bytes(weights[h] * inverse[h]) for h in each]
        products = [integer_dot(parts[h], values[h], ((1,), (0,))) for h in each]
        return jnp.concatenate([joined(products[h]) * steps[h] for h in each])
    values = [widen(x, dtype) for x in values]
    if alive is not None:
        # In float32: a select of packed halves is what libtpu's simulator on v5e cannot follow.
        values = [jnp.where(alive[0], x.astype(jnp.float32), 0).astype(x.dtype) for x in values]
    return jnp.concatenate([dot(weights[h].astype(dtype), values[h], ((1,), (0,))) for h in each])


def two_bytes(x):
    """Return whole numbers of at most TOP, given as float32 `[R, X]`, as high bytes over low bytes, `[2R, X]` int8."""
    n = jnp.round(x).astype(jnp.int32)
    high = (n + 128) >> 8
    return jnp.concatenate([high, n - (high << 8)]).astype(jnp.int8)


def integer_dot(a, b, contract):
    """Return a product of integers of a byte, int32."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.int32)


def joined(products):
    """Return the product that those of the high and of the low bytes amount to, float32."""
    R = products.shape[0] // 2
    return products[:R].astype(jnp.float32) * 256 + products[R:].astype(jnp.float32)
