"""Query heads beside the key head that they read, and back."""

from jaxtyping import Array, Float


def group_heads(q: Float[Array, "B T N H"], kv_heads: int, scale: float) -> Float[Array, "B K GT H"]:
    """Return scaled queries, those that read one key head side by side."""
    B, T, N, H = q.shape
    G = N // kv_heads
    return (q * scale).reshape(B, T, kv_heads, G, H).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, G * T, H)


def join_heads(out: Float[Array, "B K G T H"]) -> Float[Array, "B T N H"]:
    """Return the heads of each token in their order."""
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
