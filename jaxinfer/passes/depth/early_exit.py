"""Each token runs only as many layers as it needs: time is saved where a whole step leaves early, quality is at stake.

Single tokens save most: in a batch a layer runs while one row needs it, and a criterion that reads the next-token
distribution computes it at every exit. `jaxinfer exits` shows what is left of it.
"""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InputError, nearest
from jaxinfer.models.layers import Linear
from jaxinfer.models.transformer import Transformer
from jaxinfer.passes.base import About, Technique, is_abstract
from jaxinfer.passes.depth.criteria import Entropy, Gap, Head, Patience, Saturation
from jaxinfer.passes.depth.early_exit_nodes import EarlyExit
from jaxinfer.passes.layout.fused import FusedQKV, unfuse_qkv
from jaxinfer.program import Program
from jaxinfer.tree import replace, rewrite, select

CRITERIA: dict[str, tuple[type, float]] = {  # and the threshold by default
    "gap": (Gap, 0.9),
    "entropy": (Entropy, 0.9),
    "saturation": (Saturation, 0.98),
    "patience": (Patience, 3),
    "head": (Head, 0.5),
}
ROOT = "it decides already how many layers a token runs: choose one of the two"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExits(Technique):
    """Let a token leave after a layer where `criterion` reaches `threshold`; its state stands in for the layers above.

    Criteria: gap `p_1 - p_2` and entropy `1 - H / log V` of the next token, saturation `cos(x, layer(x))`, patience
    (the likeliest token was the same at so many exits in a row), and head, a learned `sigmoid(w norm(x) + b)`.
    """

    name: ClassVar[str] = "early_exit"
    about: ClassVar[About] = About(
        family="depth",
        paper="2207.07061",
        degenerate={"threshold": 1e9},
        bound=1.5,
        changes="flops",
        conflicts={"early_exit": ROOT, "skip_decode": ROOT},
    )
    criterion: str = "gap"  # gap, entropy, saturation, patience or head
    threshold: float | None = None  # none: 0.9 for gap and entropy, 0.98 saturation, 3 patience, 0.5 head
    first: int | None = None  # layers that every token runs; none: three quarters of them
    every: int = 1  # layers from one exit to the next
    file: str = ""  # the head's weights: .npz with w [embed_dim] and b []

    def __call__(self, program: Program) -> Program:
        """Apply the pass.

        Raises:
            InputError: an unknown criterion, an exit that the model does not have, a threshold below 0, a file that
                does not fit, or a pass before that forbids this one.
        """
        if self.criterion not in CRITERIA:
            raise InputError(f"early_exit:criterion={self.criterion!r}: {nearest(self.criterion, CRITERIA)}")
        if self.threshold is not None and self.threshold < 0:
            raise InputError(f"early_exit:threshold={self.threshold}: must be 0 or more")
        if (self.file != "") and self.criterion != "head":
            raise InputError(f"early_exit:file={self.file}: only criterion=head has weights; leave it out")
        L = len(program.model.layers)
        if self.first is not None and not 1 <= self.first < max(L, 2):
            raise InputError(f"early_exit:first={self.first}: must be in 1..{L - 1}: the model has {L} layers")
        if self.every < 1:
            raise InputError(f"early_exit:every={self.every}: must be 1 or more")
        head = None if not self.file else _read_head(self.file, program.config.embed_dim)
        out = super(EarlyExits, dataclasses.replace(self, file="")).__call__(program)
        if head is None or is_abstract(out.model):
            return out
        router = replace(out.model.criterion.router, **head)
        return out.replace(model=replace(out.model, criterion=replace(out.model.criterion, router=router)))

    def transform(self, program: Program) -> Program:
        """Put the model's parts under a root that lets tokens leave."""
        model, L = program.model, len(program.model.layers)
        first = max(1, 3 * L // 4) if self.first is None else self.first
        # Above an exit keys and values are wanted without queries.
        layers = [*model.layers[:first], *map(_apart, model.layers[first:])]
        parts = {name: getattr(model, name) for name in Transformer.__dataclass_fields__}
        exits = tuple(range(first, L, self.every))
        root = EarlyExit(**{**parts, "layers": layers}, criterion=self._criterion(program), exits=exits)
        return program.replace(model=root)

    def _criterion(self, program: Program) -> Any:
        kind, default = CRITERIA[self.criterion]
        threshold = default if self.threshold is None else self.threshold
        if kind is Patience:
            return Patience(patience=int(np.ceil(threshold)))
        if kind is not Head:
            return kind(threshold=threshold)
        zeros = jnp.zeros((program.config.embed_dim, 1), jnp.float32)
        router = Linear(zeros, bias=zeros[0], eq="btd,de->bte", axes=("embed", "exit"))
        return Head(router=router, threshold=threshold)


def _apart(block: Any) -> Any:
    return rewrite(block, FusedQKV, ".*", unfuse_qkv) if select(block, FusedQKV) else block


def _read_head(path: str, size: int) -> dict[str, Any]:
    try:
        with np.load(Path(path)) as stored:
            w, b = np.asarray(stored["w"], np.float32), np.asarray(stored["b"], np.float32)
    except OSError as e:
        raise InputError(f"early_exit:file={path}: {e.strerror or 'can not be read'}; give an .npz file") from None
    except (ValueError, KeyError) as e:
        raise InputError(f"early_exit:file={path}: has no w and b ({e}); save it with numpy.savez(w=..., b=...)") from e
    if w.shape != (size,) or b.shape != ():
        raise InputError(f"early_exit:file={path}: w has shape {w.shape}, b {b.shape}; they must be ({size},) and ()")
    return {"kernel": jnp.asarray(w[:, None]), "bias": jnp.asarray(b[None])}
