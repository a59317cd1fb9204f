"""What a step must read and compute on each device, counted from shapes: XLA's own count leaves kernels out."""

import dataclasses
import math
from typing import Any

import jax

from jaxinfer.cache.packed_pages import PackedPages
from jaxinfer.cache.paged import PagedLayer
from jaxinfer.cache.streaming import Streaming
from jaxinfer.models.moe import Experts
from jaxinfer.ops.quantized import is_quantized
from jaxinfer.passes.quantization.nodes import DynamicEmbedding, DynamicExperts, DynamicLinear
from jaxinfer.plan.building import Built
from jaxinfer.sharding.names import owner
from jaxinfer.sharding.specs import shard_bytes
from jaxinfer.tree import path_of

_PAGED = (PagedLayer, PackedPages)


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes and FLOPs of one device in a step; a multiply and an add are two."""

    weight_bytes: float | int  # read: of experts those that some token chooses, of a table that only looks up its rows
    cache_bytes: float | int  # read: the live tokens, of a window those in it; of a divided context the fullest part
    activation_bytes: float | int  # what products read and write beside the weights
    product_flops: float | int  # with weights, in floats
    integer_flops: float | int  # with weights, in int8
    attention_flops: float | int

    @property
    def bytes(self) -> float | int:
        """All bytes."""
        return self.weight_bytes + self.cache_bytes + self.activation_bytes

    @property
    def flops(self) -> float | int:
        """All FLOPs."""
        return self.product_flops + self.integer_flops + self.attention_flops

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def count(
    built: Built, rows: int, tokens: int, before: int, context: int = 0, *, layers: bool = True, ends: bool = True
) -> Work:
    """Return the work of a step in which each of `rows` rows gets `tokens` new tokens after `before` old ones.

    It is that of the layers and of the ends, the embedding and the head, or of one of the two. A row has slots for
    `context` tokens, or for these: where devices divide them, the first ones fill first. Logits are of each row's last
    token. Which experts are read is the expectation where every token chooses at random: `1 - (1 - k / E) ** tokens`
    of them.
    """
    per_group = rows / built.ways("batch", rows)  # rows that a device works on
    own = built.tokens(tokens)  # of each of them
    totals = dict.fromkeys(("weight_bytes", "activation_bytes", "product_flops", "integer_flops"), 0.0)
    leaves = jax.tree_util.tree_flatten_with_path(built.model, is_leaf=is_quantized)[0]
    shardings = iter(jax.tree.leaves(built.shardings))
    for keys, leaf in leaves:
        parts = jax.tree.leaves(leaf)
        lies = [next(shardings) for _ in parts]
        if not (layers if path_of(keys).startswith("layers.") else ends):
            continue
        size = shard_bytes(parts, lies)
        node, field = owner(built.model, keys)
        head = field.partition(".")[0] if node is not None else ""
        if head not in ("kernel", "table"):
            totals["weight_bytes"] += size
            continue
        if head == "table" and built.model.unembed is not None:
            totals["weight_bytes"] += min(size, per_group * own * size / leaf.shape[0])
            continue
        is_head = head == "table" or node is built.model.unembed
        seen = per_group * (1 if is_head else own)  # tokens that meet this weight
        read, met = 1.0, seen
        if isinstance(node, Experts):
            chosen = built.model.config.moe.experts_per_token / leaf.shape[0]
            read, met = 1 - (1 - chosen) ** seen, seen * chosen
        ways = _ways(built, lies[0].spec)
        flops = 2.0 * met * math.prod(leaf.shape) / ways
        integer = isinstance(node, (DynamicLinear, DynamicEmbedding, DynamicExperts))
        totals["integer_flops" if integer else "product_flops"] += flops
        totals["weight_bytes"] += read * size
        totals["activation_bytes"] += _activations(node, leaf, met, lies[0], built)
    cache_bytes, attention = _attention(built, rows, tokens, before, context) if layers else (0.0, 0.0)
    return Work(cache_bytes=cache_bytes, attention_flops=attention, **totals)


def _ways(built: Built, spec: Any) -> int:
    """Return over how many devices a product is divided beyond the rows: axes that divide rows only store it so."""
    over_rows = built.rules.mesh_axes("batch", built.sizes)
    axes = [a for entry in spec for a in ((entry,) if isinstance(entry, str) else entry or ())]
    return math.prod(built.sizes[a] for a in axes if a not in over_rows)


def _activations(node: Any, leaf: Any, met: float | int, lies: Any, built: Built) -> float | int:
    """Return the bytes of a product's inputs and outputs, two a number, each divided as the weight's axes are."""
    local = lies.shard_shape(jax.tree.leaves(leaf)[0].shape)
    if isinstance(node, Experts):
        groups, *sides = leaf.shape
        local_sides = [n * b // a for n, a, b in zip(sides, jax.tree.leaves(leaf)[0].shape[1:], local[1:], strict=True)]
        return 2.0 * met * groups / _ways(built, lies.spec[:1]) * sum(local_sides)
    eq = getattr(node, "eq", "btd,vd->btv")
    inner, kernel = eq.split("->")[0].split(",")
    stored = jax.tree.leaves(leaf)[0].shape
    sides = {True: 1.0, False: 1.0}
    for letter, whole, held, part in zip(kernel, leaf.shape, stored, local, strict=True):
        sides[letter in inner[2:]] *= whole * part / held
    return 2.0 * met * (sides[True] + sides[False])


def _attention(built: Built, rows: int, tokens: int, before: int, context: int) -> tuple[float | int, float]:
    """Return the bytes of the cache that a device reads, and the FLOPs of its scores and sums.

    Of devices that divide a context, those of the one with the most live slots, which all queries come by.
    """
    config = built.model.config
    over = built.ways("sequence", 0)  # a number that every mesh divides, as slots are chosen to be
    length = max(context, before + tokens) if over > 1 else before + tokens
    cache, lies = built.cache(rows, length)
    slots = _slots(cache.layers)
    slots, most = slots // over, slots // over if over > 1 else before + tokens
    size, flops = 0.0, 0.0
    ways = built.ways("batch", rows) * built.ways("heads", config.num_heads)
    for i, (layer, lie, block) in enumerate(zip(cache.layers, lies.layers, built.model.layers, strict=True)):
        window, read, kind = config.window(i) or before + tokens, slots, block.attention.cache
        if isinstance(kind, Streaming) and kind.window < slots:  # it lets go of tokens: of what it holds all is read
            read = _slots(layer)
            window = min(window, read)
        live = min(before + tokens, window + tokens - 1, most)
        size += shard_bytes(layer, lie) * min(1.0, live / read)
        pairs = sum(min(before + t + 1, window, most) for t in (0, tokens - 1)) / 2 * tokens
        flops += 4.0 * rows * config.num_heads * config.head_dim * pairs / ways
    return size, flops


def _slots(layers: Any) -> int:
    """Return the slots of layers' caches, the most of them: the third axis, or what the pages of a row have."""
    nodes = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, _PAGED))
    paged = [node.slots for node in nodes if isinstance(node, _PAGED)]
    return max(paged or [leaf.shape[2] for leaf in nodes if len(leaf.shape) > 2])
