"""New tokens on their way into attention: queries and keys turn by their positions, keys and values are appended."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Int

from jaxinfer.cache.base import LayerCache
from jaxinfer.cache.ring import SLACK, Ring
from jaxinfer.ops.implementation import Implementation, choose, with_gradient_of
from jaxinfer.ops.paged_attention import Pages
from jaxinfer.ops.rope import RopeConfig, cos_and_sin, rotate
from pallas_kernels import rope_append as kernels
from pallas_kernels import targets

FEW_TOKENS = 512  # of all rows: with more, the launches of XLA's kernels are no part of the time


def append_rotated(
    cache: LayerCache,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    rope: RopeConfig,
    start: Int[Array, "B"],
    counts: Int[Array, "B"],
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T N H"], LayerCache]:
    """Return q rotated, and `cache.append` of k rotated and v.

    A cache that keeps position s of a row in slot s of its arrays `[B, K, S, ...]` has `stores`, which names them as
    the kernel takes them: keys, values, and the scales of each where it rounds them. One that keeps it in a ring, or
    in pages, has `append_by(put, tokens, start, counts)`, which does what `append` does but for what
    `put(ring, start, counts)` does, or `put(pages, start, counts, table=...)`: that gives q, and the ring or the pages
    with few new tokens in their slots. One that `append` leaves with tokens that are yet to be written has `written`.

    Raises:
        NotImplementedError: the implementation that is named can't do it; why.
    """

    def xla(cache: LayerCache, q: Array, k: Array, v: Array, positions: Array, start: Array, counts: Array) -> Any:
        q, k = rotate(q, positions, rope), rotate(k, positions, rope)
        cache = cache.append(k, v, start, counts)
        # A program that has both ways needs the same of both.
        return q, cache.written() if at_once and hasattr(cache, "written") else cache

    def pallas(cache: LayerCache, q: Array, k: Array, v: Array, positions: Array, start: Array, counts: Array) -> Any:
        T, turns = k.shape[1], cos_and_sin(rope, q.shape[-1], positions)

        def put(to: Any, start: Array, counts: Array, **options: Any) -> Any:
            if isinstance(to, Ring):
                if T > SLACK:
                    raise NotImplementedError(f"{T} new tokens: must be at most {SLACK}: their queries need them apart")
                to, options = to.settled(), {"ring": True}
            held = [getattr(to, name) for name in to.stores]
            turned, held = targets.kernel(kernels)(q, k, v, *turns, start, counts, *held, **options)
            held = dict(zip(to.stores, held, strict=True))
            return turned, to._replace(**held) if isinstance(to, Pages) else dataclasses.replace(to, **held)

        if hasattr(cache, "append_by"):
            return cache.append_by(put, T, start, counts)
        if not hasattr(cache, "stores"):
            raise NotImplementedError(f"{type(cache).__name__}: has no slots that the kernel could write to")
        return put(cache, start, counts)

    at_once = targets.platform() == "cuda"
    if implementation is None and q.shape[0] * q.shape[1] > FEW_TOKENS:
        implementation = "xla"
    return choose(implementation, with_gradient_of(xla, pallas), xla, cache, q, k, v, positions, start, counts)
