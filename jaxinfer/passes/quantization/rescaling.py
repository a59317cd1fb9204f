"""Places in a layer where a factor for each channel can move from an activation into the weights that read it.

`(x / s) (s W) = x W`: what writes x is divided by s, every kernel that reads x is multiplied. Exact up to float
rounding; AWQ and SmoothQuant choose s so that rounding costs less.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxinfer.errors import InputError, nearest
from jaxinfer.models.layers import Linear, RMSNorm
from jaxinfer.models.moe import Experts, MoE
from jaxinfer.models.transformer import MLP, QKV, Attention, GateUp
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV
from jaxinfer.passes.layout.turn import turn
from jaxinfer.passes.quantization.weights import outputs_first
from jaxinfer.tree import replace, rewrite, select

FOLDS = ("qkv", "gate_up", "down", "o")  # what reads the activation: of the norms, of up (times gate), of v


@dataclasses.dataclass(frozen=True)
class Fold:
    """An activation whose channels can be rescaled: the paths that read it in the layer, and how its writer is divided.

    Factors have the writer's channels, `[C]`, or `[E, C]` for the hidden layers of experts. Attention reads each head
    of v for `shared` query heads of `run` channels.
    """

    name: str
    readers: tuple[str, ...]
    divide: Callable[[Any, Array], Any]
    shared: int = 1
    run: int = 1

    def narrow(self, stat: Float[Array, "*E I"], reduce: Callable = jnp.max) -> Float[Array, "*E C"]:
        """Return a statistic of the readers' inputs for each channel of the writer."""
        return stat if self.shared == 1 else reduce(stat.reshape(-1, self.shared, self.run), axis=1).reshape(-1)

    def widen(self, factors: Float[Array, "*E C"]) -> Float[Array, "*E I"]:
        """Return each input's factor: the inverse of `narrow`."""
        return factors if self.shared == 1 else jnp.repeat(factors.reshape(-1, self.run), self.shared, 0).reshape(-1)

    def rescale(self, block: Any, factors: Float[Array, "*E C"]) -> Any:
        """Return the layer, the same function, with the writer divided by `factors` and its readers multiplied.

        Raises:
            InputError: a reader or writer is quantized already.
        """
        wide = self.widen(factors)
        for path in self.readers:
            block = rewrite(block, (Linear, Experts), re.escape(path), lambda node: _multiply_inputs(node, wide))
        return self.divide(block, factors)


def folds(block: Any, names: Sequence[str] = FOLDS) -> list[Fold]:
    """Return those of the named places that this layer has; passes applied before may have closed some.

    Raises:
        InputError: an unknown name.
    """
    if unknown := [name for name in names if name not in FOLDS]:
        raise InputError(f"folds: {unknown[0]!r}: {nearest(unknown[0], FOLDS)}")
    found = (_OPEN[name](block) for name in FOLDS if name in names)
    return [fold for fold in found if fold is not None]


def _after_norm(block: Any, norm: str, name: str, part: str) -> Fold | None:
    readers = tuple(f"{part}.{path}".rstrip(".") for path in select(_at(block, part), (Linear, Experts)))
    if type(_at(block, norm)) is not RMSNorm or not readers:
        return None
    return Fold(
        name,
        readers,
        lambda block, s: rewrite(block, RMSNorm, norm, lambda n: replace(n, scale=(n.scale / s).astype(n.scale.dtype))),
    )


def _qkv(block: Any) -> Fold | None:
    known = isinstance(_at(block, "attention.qkv"), (QKV, FusedQKV))
    return _after_norm(block, "attention_norm", "qkv", "attention.qkv") if known else None


def _gate_up(block: Any) -> Fold | None:
    if isinstance(block.mlp, MoE):
        fold = _after_norm(block, "mlp_norm", "gate_up", "mlp")
        readers = tuple(p for p in fold.readers if not p.startswith("mlp.down")) if fold else ()
        return fold and dataclasses.replace(fold, readers=readers)
    known = isinstance(_at(block, "mlp.gate_up"), (GateUp, FusedGateUp))
    return _after_norm(block, "mlp_norm", "gate_up", "mlp.gate_up") if known else None


def _down(block: Any) -> Fold | None:
    if isinstance(block.mlp, MoE):
        divide = lambda block, s: rewrite(block, Experts, r"mlp\.up", lambda n: _divide_experts(n, s))  # noqa: E731
        return Fold("down", ("mlp.down",), divide)
    wide = _at(block, "mlp.gate_up")
    if not (type(block.mlp) is MLP and isinstance(block.mlp.down, Linear) and isinstance(wide, (GateUp, FusedGateUp))):
        return None
    path = "mlp.gate_up.up" if isinstance(wide, GateUp) else "mlp.gate_up.linear"
    return Fold("down", ("mlp.down",), _divide_last_outputs(path))


def _o(block: Any) -> Fold | None:
    a = block.attention
    if not (type(a) is Attention and isinstance(a.o, Linear) and isinstance(a.qkv, (QKV, FusedQKV))):
        return None
    path = "attention.qkv.v" if isinstance(a.qkv, QKV) else "attention.qkv.linear"
    shape = dict(zip(a.o.axes, a.o.kernel.shape, strict=True))
    shared = shape["heads"] // a.num_kv_heads
    return Fold("o", ("attention.o",), _divide_last_outputs(path), shared=shared, run=shape["head_dim"])


_OPEN = {"qkv": _qkv, "gate_up": _gate_up, "down": _down, "o": _o}


def _divide_last_outputs(path: str) -> Callable[[Any, Array], Any]:
    """Return what divides the last outputs of a linear map: in a fused one the others come first."""

    def divide(node: Linear, s: Array) -> Linear:
        turned, kernel, inputs = outputs_first(node)
        outputs = kernel.shape[: kernel.ndim - inputs]
        by_output = jnp.concatenate([jnp.ones((math.prod(outputs) - s.size,), s.dtype), 1 / s]).reshape(outputs)
        kernel = _times(kernel, jnp.expand_dims(by_output, tuple(range(-inputs, 0))))
        bias = None if node.bias is None else _times(node.bias, by_output)
        return _turn_back(replace(turned, kernel=kernel, bias=bias), node)

    return lambda block, s: rewrite(block, Linear, re.escape(path), lambda node: divide(node, s))


def _multiply_inputs(node: Linear | Experts, s: Float[Array, "*E I"]) -> Linear | Experts:
    turned, kernel, inputs = outputs_first(node)
    if isinstance(node, Experts):
        return replace(node, kernel=_times(node.kernel, s[..., None]))
    kernel = _times(kernel, s.reshape(kernel.shape[kernel.ndim - inputs :]))
    return _turn_back(replace(turned, kernel=kernel), node)


def _divide_experts(node: Experts, s: Float[Array, "E C"]) -> Experts:
    outputs_first(node)  # refuses a quantized kernel
    return replace(node, kernel=_times(node.kernel, 1 / s[:, None]))


def _turn_back(node: Linear, like: Linear) -> Linear:
    return node if node.eq == like.eq else turn(node, inputs_first=True)


def _times(w: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "..."]:
    return (w.astype(jnp.float32) * s).astype(w.dtype)


def _at(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name, None)
    return block
