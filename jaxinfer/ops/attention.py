"""Softmax attention of query tokens against cache slots, masked by absolute positions."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int8, Shaped, UInt8

from jaxinfer.errors import InputError
from jaxinfer.ops.cpu_attention import on_cpu
from jaxinfer.ops.cudnn_attention import on_cudnn
from jaxinfer.ops.heads import group_heads, join_heads
from jaxinfer.ops.implementation import Implementation, choose
from jaxinfer.ops.kernel_attention import kernel_attention
from jaxinfer.ops.token_tree import TokenTree, last_slot, tree_visible

MASKED = -1e30  # finite, so that padding, which sees nothing, gives numbers and not NaN
QUERY_BLOCK = 256  # query tokens scored together in a prefill: bounds the score matrix to [N, 256, live slots]
_SMALLEST_READ = 128  # slots; below it a smaller read saves nothing


class Scaled(NamedTuple):
    """Keys or values in a byte each: `values * scale`, with one scale a token and head.

    The values are int8, or the bits of float8_e4m3fn as uint8: XLA's CPU backend moves numbers of that type by way of
    float16, all of a cache at once.
    """

    values: Int8[Array, "B K S H"] | UInt8[Array, "B K S H"]
    scale: Float[Array, "B K S"]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    positions: Int[Array, "B T"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    tree: TokenTree | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Return `softmax(softcap(scale * q k^T) + mask) v`, where slot s holds the key of position s.

    A query at position p sees positions p - window + 1 .. p. A row's positions follow on one another, or are those of
    the nodes of `tree`, whose keys are in the slots from the first one's position; a negative one
    marks padding after them: its output is finite and means nothing. Slots past the last query position are never
    used, whatever they hold; XLA reads at most the next power of two of the live slots, a kernel their blocks.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """
    options = dict(scale=scale, window=window, softcap=softcap)

    def pallas(q, k, v, positions, tree):
        return kernel_attention(q, k, v, positions, tree=tree, **options)

    def xla(q, k, v, positions, tree):
        check_tree(q, tree)
        return by_query_blocks(lambda q, p, _: _attend_block(q, k, v, p, tree, **options), q, positions)

    def best(q, k, v, positions, tree):
        if tree is not None or softcap is not None:
            return xla(q, k, v, positions, tree)
        if jax.default_backend() == "gpu":
            return on_cudnn(functools.partial(xla, tree=None), visible, q, k, v, positions, scale=scale, window=window)
        return on_cpu(functools.partial(xla, tree=None), q, k, v, positions, scale=scale, window=window)

    return choose(implementation, pallas, xla if implementation else best, q, k, v, positions, tree)


def check_tree(q: Float[Array, "B T N H"], tree: TokenTree | None) -> None:
    """Raise InputError where a tree has more nodes than are scored together."""
    if tree is not None and q.shape[1] > QUERY_BLOCK:
        raise InputError(f"a tree of {q.shape[1]} nodes: must have at most {QUERY_BLOCK}")


def by_query_blocks(
    attend: Callable[..., Any],
    q: Float[Array, "B T N H"],
    positions: Int[Array, "B T"],
    *more: Shaped[Array, "B T ..."],
) -> Any:
    """Return `attend(queries, positions, index of the first, *more)` of blocks of at most 256 queries, one by one.

    What it gives, `[B, T, ...]` each, is that of all queries.
    """
    T = q.shape[1]
    if T <= QUERY_BLOCK:
        return attend(q, positions, jnp.int32(0), *more)
    blocks = -(-T // QUERY_BLOCK)

    def cut(x, fill=0):
        pad = ((0, 0), (0, blocks * QUERY_BLOCK - T), *((0, 0),) * (x.ndim - 2))
        return jnp.stack(jnp.split(jnp.pad(x, pad, constant_values=fill), blocks, axis=1))

    first = jnp.arange(blocks, dtype=jnp.int32) * QUERY_BLOCK
    found = jax.lax.map(lambda block: attend(*block), (cut(q), cut(positions, -1), first, *map(cut, more)))
    return jax.tree.map(lambda x: jnp.concatenate(list(x), axis=1)[:, :T], found)


def _attend_block(q, k, v, positions, tree, scale, window, softcap):
    """Attend with the smallest read that covers every position a query of this block sees."""
    S, T = k.shape[2], q.shape[1]
    last = last_slot(positions, tree)
    first = jnp.int32(0)
    sizes = _read_sizes(S)
    if window is not None:
        seen = jnp.where(positions < 0, S, positions).min() - window + 1
        first = jnp.clip(seen, 0, S - 1)
        if q.shape[0] == 1 and tree is None:  # the rows of a ragged batch may be far apart: any span is possible
            sizes = [s for s in sizes if s < window + T] + [s for s in sizes if s >= window + T][:1]

    def read(size: int):
        def attend(q, k, v, positions, first):
            if window is None:
                start = jnp.int32(0)
                k, v = k[:, :, :size], v[:, :, :size]
            else:
                start = jnp.minimum(first, S - size)
                k = jax.lax.dynamic_slice_in_dim(k, start, size, axis=2)
                v = jax.lax.dynamic_slice_in_dim(v, start, size, axis=2)
            return _softmax_attention(q, k, v, positions, start + jnp.arange(size), tree, scale, window, softcap)

        return attend

    if len(sizes) == 1:
        return read(sizes[0])(q, k, v, positions, first)
    in_sight = last + 1 - first
    index = sum((in_sight > size).astype(jnp.int32) for size in sizes[:-1])  # the first size that covers them
    return jax.lax.switch(index, [read(s) for s in sizes], q, k, v, positions, first)


def _read_sizes(slots: int) -> list[int]:
    sizes, size = [], _SMALLEST_READ
    while size < slots:
        sizes.append(size)
        size *= 2
    return [*sizes, slots]


def _softmax_attention(q, k, v, positions, slots, tree, scale, window, softcap):
    seen = visible(positions, slots[None], window, tree)
    return ungroup_heads(share(group_heads(q, k.shape[1], scale), k, v, seen, softcap), q)


def visible(
    positions: Int[Array, "B T"], slots: Int[Array, "b S"], window: int | None, tree: TokenTree | None = None
) -> Bool[Array, "B T S"]:
    """Return which slots, by the positions that they hold, each query sees: `p - window < s <= p`, or a tree's."""
    if tree is not None:
        return tree_visible(positions, slots, window, tree)
    p, s = positions[:, :, None], slots[:, None, :]
    return s <= p if window is None else (s <= p) & (s > p - window)


class Share(NamedTuple):
    """What some slots contribute to a softmax: `out / total` is their attention; weights are `exp(score - peak)`."""

    out: Float[Array, "B K G T H"]
    total: Float[Array, "B K G T 1"]
    peak: Float[Array, "B K G T 1"]


def share(
    q: Float[Array, "B K GT H"],
    k: Float[Array, "B K S H"] | Scaled,
    v: Float[Array, "B K S H"] | Scaled,
    seen: Bool[Array, "B T S"],
    softcap: float | None,
) -> Share:
    """Return what the slots that each query sees contribute; of a query that sees none, a finite share of no weight.

    What a slot that no query sees holds is never used, NaN included.
    """
    B, K, _, _ = q.shape
    T, S = seen.shape[1:]
    keys = _widened(k.values, q.dtype) if isinstance(k, Scaled) else k
    scores = jnp.einsum("bkgh,bksh->bkgs", q, keys, preferred_element_type=jnp.float32)
    if isinstance(k, Scaled):
        scores *= k.scale.astype(jnp.float32)[:, :, None]
    scores = scores.reshape(B, K, -1, T, S)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    peak = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - peak)  # exactly 0 where masked
    total = weights.sum(axis=-1, keepdims=True)
    used = seen.any(axis=1)[:, None, :, None]  # 0 * NaN is NaN
    weights = weights.reshape(B, K, -1, S)
    if isinstance(v, Scaled):
        weights *= jnp.where(used[..., 0], v.scale.astype(jnp.float32), 0)[:, :, None]
    values = jnp.where(used, _widened(v.values, q.dtype) if isinstance(v, Scaled) else v, 0)
    out = jnp.einsum("bkgs,bksh->bkgh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Share(out.reshape(B, K, -1, T, out.shape[-1]), total, peak)


def _widened(codes: Array, dtype: jnp.dtype) -> Array:
    """Return the numbers that int8 codes or float8_e4m3fn bits stand for; the NaN of the latter may come out as one."""
    if codes.dtype == jnp.int8:
        return codes.astype(dtype)

    def by_bits(codes: Array) -> Array:
        # XLA's CPU backend converts float8 one by one, thirty times slower than it moves these bits.
        code = codes.astype(jnp.uint32)
        size = code & 0x7F
        # The exponent's bias is 7, and float32's 127. Below 2^-6 there is no leading 1: put one there, and take it off.
        normal = jax.lax.bitcast_convert_type((size << 20) + (120 << 23), jnp.float32)
        tiny = jax.lax.bitcast_convert_type((size << 20) + (121 << 23), jnp.float32) - 2.0**-6
        number = jnp.where(size < 8, tiny, normal)
        return jnp.where(code > 0x7F, -number, number).astype(dtype)

    def convert(codes: Array) -> Array:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(dtype)

    return jax.lax.platform_dependent(codes, cpu=by_bits, default=convert)


def ungroup_heads(shares: Share, q: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Return the attention that the shares amount to, in the layout and dtype of the queries `q`."""
    return join_heads(shares.out / shares.total).astype(q.dtype)
