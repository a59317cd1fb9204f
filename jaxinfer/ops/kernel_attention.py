"""Attention of the model's queries by the kernels, which take a row's position and length, not one a query."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.ops.token_tree import TokenTree
from pallas_kernels import decode_attention, targets
from pallas_kernels.prefill_attention import gradient

TREE_NODES = 64  # whose mask is one lane each, beside the depth
DECODE_TOKENS = 8  # new tokens of a row up to which the cache's bytes, not the products, take the time


def kernel_attention(
    q: Float[Array, "B T N H"],
    k: Array,
    v: Array,
    positions: Int[Array, "B T"],
    *,
    k_scale: Float[Array, "B K S"] | None = None,
    v_scale: Float[Array, "B K S"] | None = None,
    tree: TokenTree | None = None,
    **options: Any,
) -> Float[Array, "B T N H"]:
    """Return what `ops.attention.attention` returns for queries whose positions follow on one another.

    Padding, at negative positions, comes after a row's queries; a row of padding alone gives 0. `options`: scale,
    window, softcap.

    Raises:
        NotImplementedError: a tree of more nodes than the kernel takes.
    """
    T = q.shape[1]
    if k.dtype == jnp.uint8:
        k, v = (jax.lax.bitcast_convert_type(x, jnp.float8_e4m3fn) for x in (k, v))
    if tree is not None:
        if T > TREE_NODES:
            raise NotImplementedError(f"a tree of {T} nodes: the kernel takes {TREE_NODES}")
        # The nodes are the last slots of a row; one of padding alone has none.
        length = jnp.where(positions[:, 0] < 0, 0, positions[:, 0] + T)
        attend = functools.partial(
            targets.kernel(decode_attention), length=length, tree=jnp.asarray(tree.ancestors), **options
        )
        return attend(q, k, v, k_scale=k_scale, v_scale=v_scale)
    length = positions.max(axis=1) + 1
    few = T <= DECODE_TOKENS
    attend = targets.kernel(decode_attention) if few else gradient.prefill_attention
    attend = functools.partial(attend, length=length, position=positions[:, 0], **options)
    return attend(q, k, v, k_scale=k_scale, v_scale=v_scale)
