"""Layers left out whole: their time, weights and cache are saved, and what they computed is lost.

It makes a smaller model, or a draft for speculation that costs nothing to make.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.passes.base import About, Calibrated, Technique, is_abstract
from jaxinfer.passes.depth.influence import block_influence
from jaxinfer.program import Program
from jaxinfer.tree import replace

_COUNTED = "it counts the layers after which a token may leave: put skip_layers first"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipLayers(Calibrated):
    """Leave out `layers`, or those that a file of `jaxinfer search-skips` names, or the `count` of least influence.

    A layer's influence on a text is `1 - mean cos(x, layer(x))` over its tokens.
    """

    name: ClassVar[str] = "skip_layers"
    about: ClassVar[About] = About(
        family="depth",
        paper="2403.03853",
        degenerate={"count": 0},
        bound=1.5,
        changes="flops",
        conflicts={"early_exit": _COUNTED, "skip_decode": _COUNTED},
    )
    wants: ClassVar[tuple[str, ...]] = ()
    layers: tuple[int, ...] = ()  # which layers, from 0: 3+7+9
    file: str = ""  # or where they are written: the --out of jaxinfer search-skips
    count: int = 1  # or how many: those of least influence on the calibration text; 0 is none

    def __call__(self, program: Program) -> Program:
        """Find which layers, and leave them out.

        Raises:
            InputError: a layer that the model does not have, all of them, a file that names none, both `layers` and
                `file`, no calibration text where it has to be chosen, or a pass before that forbids this one.
        """
        self.check(program)
        layers = self._choose(program)
        check_layers(layers, len(program.model.layers))
        return Technique.__call__(dataclasses.replace(self, layers=layers, file="", count=len(layers)), program)

    def transform(self, program: Program) -> Program:
        """Return the program without the layers; those that remain keep what they are, with new numbers."""
        kept = [i for i in range(len(program.model.layers)) if i not in self.layers]
        layers = [program.model.layers[i] for i in kept]
        model = replace(program.model, layers=layers, config=without_layers(program.config, kept))
        return program.replace(model=model)

    def _choose(self, program: Program) -> tuple[int, ...]:
        if self.layers and self.file:
            raise InputError(f"skip_layers:file={self.file}: layers= is given too; give one of them")
        if self.file:
            return read_skips(self.file)
        if self.layers or not self.count:
            return self.layers
        number = len(program.model.layers)
        if not 0 < self.count < number:
            raise InputError(f"skip_layers:count={self.count}: must be in 0..{number - 1}: the model has {number}")
        if is_abstract(program.model):  # which ones is not known, but how many: those before the last
            return tuple(range(number - 1 - self.count, number - 1))
        if self.calibration is None:
            raise InputError(
                "skip_layers: needs text to find the layers of least influence; give --calibrate FILE, or name them: "
                "skip_layers:layers=3+7"
            )
        return least(block_influence(program.model, self.calibration), self.count)


def least(influence: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the `count` layers of least influence, in their order."""
    return tuple(sorted(sorted(range(len(influence)), key=lambda i: influence[i])[:count]))


def check_layers(layers: Sequence[int], number: int) -> None:
    """Raise InputError where layers are not some, and not all, of the `number` that a model has."""
    for i in layers:
        if not 0 <= i < number:
            raise InputError(f"skip_layers:layers={i}: must be in 0..{number - 1}: the model has {number} layers")
    if len(set(layers)) != len(layers):
        raise InputError(f"skip_layers:layers={'+'.join(map(str, layers))}: names a layer twice")
    if len(layers) == number:
        raise InputError(f"skip_layers: would leave none of the {number} layers; skip fewer")


def without_layers(config: ModelConfig, kept: Sequence[int]) -> ModelConfig:
    """Return the architecture that has only the layers `kept`."""
    moe = config.moe
    if moe is not None and moe.layers is not None:
        moe = dataclasses.replace(moe, layers=tuple(new for new, old in enumerate(kept) if old in moe.layers))
    windows = tuple(config.windows[i] for i in kept) if config.windows else ()
    return dataclasses.replace(config, num_layers=len(kept), windows=windows, moe=moe)


def read_skips(path: str | Path) -> tuple[int, ...]:
    """Return the layers that a file of `jaxinfer search-skips` names.

    Raises:
        InputError: no such file, or no list of layers in it.
    """
    try:
        layers = json.loads(Path(path).read_text(encoding="utf-8"))["layers"]
    except OSError as e:
        raise InputError(f"skip_layers:file={path}: {e.strerror}; make it with jaxinfer search-skips") from None
    except (ValueError, KeyError, TypeError):
        layers = None
    if not (isinstance(layers, list) and all(type(i) is int for i in layers)):
        raise InputError(f"skip_layers:file={path}: has no list of layers; make it with jaxinfer search-skips")
    return tuple(layers)
