"""The decoder-only Transformer: Llama, Mistral, Qwen, Gemma and their mixtures of experts, by configuration alone.

Modules are immutable trees of raw arrays; every call is a pure function of its arguments. Shape letters:
B batch, T query tokens, S cache slots, D embed, F mlp, N query heads, K kv heads, H head_dim, V vocab.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, DTypeLike, Float, Int

from jaxinfer.cache.base import Cache, CacheKind, LayerCache
from jaxinfer.cache.dense import Dense
from jaxinfer.cache.rotated import append_rotated
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.layers import ACTIVATIONS, Embedding, Linear, Make, RMSNorm
from jaxinfer.models.moe import build_moe
from jaxinfer.ops.rope import RopeConfig
from jaxinfer.ops.token_tree import TokenTree


@nnx.dataclass
class QKV(nnx.Module):
    """Query, key and value heads of a token."""

    q: Linear = nnx.data()
    k: Linear = nnx.data()
    v: Linear = nnx.data()

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        return self.q(x), self.k(x), self.v(x)


@nnx.dataclass
class Attention(nnx.Module):
    """Causal grouped-query attention; storage, masks and the reading of past tokens are the cache's."""

    qkv: nnx.Module = nnx.data()
    o: Linear = nnx.data()
    q_norm: RMSNorm | None = nnx.data(default=None, kw_only=True)
    k_norm: RMSNorm | None = nnx.data(default=None, kw_only=True)
    num_kv_heads: int = nnx.static(kw_only=True)
    head_dim: int = nnx.static(kw_only=True)
    scale: float = nnx.static(kw_only=True)
    rope: RopeConfig = nnx.static(kw_only=True)
    window: int | None = nnx.static(default=None, kw_only=True)
    softcap: float | None = nnx.static(default=None, kw_only=True)
    cache: CacheKind = nnx.static(default=Dense(), kw_only=True)

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike) -> LayerCache:
        return self.cache.create(batch, slots, self.num_kv_heads, self.head_dim, dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache,
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        q, k, v = self.qkv(x)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, cache = append_rotated(cache, q, k, v, positions, self.rope, start, counts)
        options = dict(scale=self.scale, window=self.window, softcap=self.softcap)
        y, cache = cache.attend(q, positions, **options, tree=tree)
        return self.o(y), cache


@nnx.dataclass
class GateUp(nnx.Module):
    """The two projections into the MLP's hidden layer."""

    gate: Linear = nnx.data()
    up: Linear = nnx.data()

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        return self.gate(x), self.up(x)


@nnx.dataclass
class MLP(nnx.Module):
    """Gated feed-forward layer: `down(activation(gate(x)) * up(x))` (2002.05202)."""

    gate_up: nnx.Module = nnx.data()
    down: Linear = nnx.data()
    activation: str = nnx.static(kw_only=True)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate, up = self.gate_up(x)
        return self.down(ACTIVATIONS[self.activation](gate) * up)


@nnx.dataclass
class Block(nnx.Module):
    """One layer: `x += attention(norm(x)); x += mlp(norm(x))`, with a norm after each where the family has it."""

    attention_norm: RMSNorm = nnx.data()
    attention: nnx.Module = nnx.data()
    mlp_norm: RMSNorm = nnx.data()
    mlp: nnx.Module = nnx.data()
    attention_post_norm: RMSNorm | None = nnx.data(default=None, kw_only=True)
    mlp_post_norm: RMSNorm | None = nnx.data(default=None, kw_only=True)

    def __call__(self, x, positions, cache, start, counts, tree=None):
        y, cache = self.attention(self.attention_norm(x), positions, cache, start, counts, tree)
        x, y = self.mlp_norm.after(x, y if self.attention_post_norm is None else self.attention_post_norm(y))
        y = self.mlp(y)
        return x + (y if self.mlp_post_norm is None else self.mlp_post_norm(y)), cache


@jax.jit
def run_block(block: nnx.Module, x: Array, positions: Array, cache: LayerCache, start: Array, counts: Array, tree):
    """Call the block; under jit, so that layers of one kind are traced and lowered once and not once each."""
    return block(x, positions, cache, start, counts, tree)


@nnx.dataclass
class Transformer(nnx.Module):
    """Tokens and a cache in, hidden states and the longer cache out; `logits` turns hidden states into scores."""

    embed: Embedding = nnx.data()
    layers: list[nnx.Module] = nnx.data()
    final_norm: RMSNorm = nnx.data()
    unembed: Linear | None = nnx.data(default=None, kw_only=True)  # None where the embedding is tied
    config: ModelConfig = nnx.static(kw_only=True)

    def init_cache(self, batch: int, slots: int, dtype: DTypeLike | None = None) -> Cache:
        """Return an empty cache for `batch` rows of up to `slots` tokens, in the model's dtype unless told."""
        dtype = self.embed.table.dtype if dtype is None else dtype
        layers = [layer.attention.init_cache(batch, slots, dtype) for layer in self.layers]
        return Cache(length=jnp.zeros((batch,), jnp.int32), layers=layers)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        cache: Cache,
        counts: Int[Array, "B"] | None = None,
        tree: TokenTree | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Return the normed hidden states of `tokens`, which follow what `cache` holds, and the cache with them in.

        Row b has `counts[b]` real tokens (default T), left-aligned; the rest is padding: not cached, seen by none.
        With `tree` they are its nodes; `Cache.keep` then keeps one path of them.
        """
        counts = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if counts is None else counts
        x, cache, _ = self.run_layers(self.embed(tokens), cache, counts, tree)
        return self.final_norm(x), cache.longer(counts)

    def run_layers(
        self,
        x: Float[Array, "B T D"],
        cache: Cache,
        counts: Int[Array, "B"],
        tree: TokenTree | None = None,
        *,
        first: int = 0,
        end: int | None = None,
        after: Sequence[int] = (),
    ) -> tuple[Float[Array, "B T D"], Cache, list[Float[Array, "B T D"]]]:
        """Return what layers first .. end - 1 make of hidden states, the cache with theirs in, and states on the way.

        The cache's length stays as it is, so that the other layers can still run. `after` names layers whose output is
        wanted as well.
        """
        offset = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        at = offset if tree is None else tree.depth
        positions = jnp.where(offset < counts[:, None], cache.length[:, None] + at, -1)
        layers, found = list(cache.layers), []
        for i in range(len(self.layers))[first:end]:
            x, layers[i] = run_block(self.layers[i], x, positions, layers[i], cache.length, counts, tree)
            if i in after:
                found.append(x)
        return x, Cache(length=cache.length, layers=layers), found

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return next-token scores in float32."""
        y = (self.embed.attend(hidden) if self.unembed is None else self.unembed(hidden)).astype(jnp.float32)
        cap = self.config.final_softcap
        return y if cap is None else cap * jnp.tanh(y / cap)


def build(config: ModelConfig, make: Make, dtype: DTypeLike = jnp.float32) -> Transformer:
    """Return a Transformer whose every leaf is `make(shape, dtype)`; norm scales ask for float32."""
    c, D, F, N, K, H = config, config.embed_dim, config.mlp_dim, config.num_heads, config.num_kv_heads, config.head_dim

    def linear(eq: str, shape: tuple[int, ...], axes: tuple[str, ...], bias: tuple[int, ...] | None = None) -> Linear:
        return Linear(make(shape, dtype), bias=None if bias is None else make(bias, dtype), eq=eq, axes=axes)

    def norm(size: int = D) -> RMSNorm:
        return RMSNorm(make((size,), jnp.dtype(jnp.float32)), eps=c.norm_eps)

    def heads(count: int, name: str) -> Linear:
        bias = (count, H) if c.qkv_bias else None
        return linear("btd,dnh->btnh", (D, count, H), ("embed", name, "head_dim"), bias)

    def attention(i: int) -> Attention:
        return Attention(
            QKV(heads(N, "heads"), heads(K, "kv_heads"), heads(K, "kv_heads")),
            linear("btnh,nhd->btd", (N, H, D), ("heads", "head_dim", "embed"), (D,) if c.out_bias else None),
            q_norm=norm(H) if c.qk_norm else None,
            k_norm=norm(H) if c.qk_norm else None,
            num_kv_heads=K,
            head_dim=H,
            scale=H**-0.5 if c.attention_scale is None else c.attention_scale,
            rope=c.layer_rope(i),
            window=c.window(i),
            softcap=c.attention_softcap,
        )

    def mlp() -> MLP:
        wide = (F,) if c.mlp_bias else None
        gate_up = GateUp(*(linear("btd,df->btf", (D, F), ("embed", "mlp"), wide) for _ in range(2)))
        down = linear("btf,fd->btd", (F, D), ("mlp", "embed"), (D,) if c.mlp_bias else None)
        return MLP(gate_up, down, activation=c.activation)

    layers = [
        Block(
            norm(),
            attention(i),
            norm(),
            build_moe(c, make, dtype) if c.is_moe(i) else mlp(),
            attention_post_norm=norm() if c.post_norms else None,
            mlp_post_norm=norm() if c.post_norms else None,
        )
        for i in range(c.num_layers)
    ]
    unembed = None if c.tie_embeddings else linear("btd,vd->btv", (c.vocab_size, D), ("vocab", "embed"))
    return Transformer(
        Embedding(make((c.vocab_size, D), dtype), multiplier=c.embed_scale),
        layers,
        norm(),
        unembed=unembed,
        config=c,
    )


def abstract(config: ModelConfig, dtype: DTypeLike = jnp.float32) -> Transformer:
    """Return the model's tree with shapes for leaves: no memory, whatever its size."""
    return build(config, jax.ShapeDtypeStruct, jnp.dtype(dtype))


def random(config: ModelConfig, seed: int = 0, dtype: DTypeLike = jnp.float32) -> Transformer:
    """Return a model with random weights: norms at one, everything else drawn at 1 / sqrt(embed_dim)."""
    keys = iter(jax.random.split(jax.random.key(seed), 16 * config.num_layers + 16))

    def make(shape: tuple[int, ...], leaf_dtype: jnp.dtype) -> Array:
        if len(shape) == 1 and leaf_dtype == jnp.float32:
            return jnp.ones(shape, leaf_dtype)
        return (jax.random.normal(next(keys), shape) * config.embed_dim**-0.5).astype(leaf_dtype)

    return build(config, make, jnp.dtype(dtype))
