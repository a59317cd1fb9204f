"""A program is a model and a decoder; a pass is a pure function from program to program."""

import dataclasses
from collections.abc import Callable, Mapping

from jaxinfer.decode.base import Autoregressive, Decoder
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import Transformer
from jaxinfer.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything that generating text takes. Passes return a new one and share what they leave alone."""

    model: Transformer
    decoder: Decoder = dataclasses.field(default_factory=Autoregressive)
    tokenizer: Tokenizer | None = None
    stop_ids: tuple[int, ...] = ()  # tokens that end a generation
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what the checkpoint recommends
    layouts: tuple[str, ...] = ()  # how the weights lie, see passes.layout.LAYOUTS
    blocks: Mapping[str, str] = dataclasses.field(default_factory=dict)  # leaves kept as a file's blocks: their qtypes
    passes: tuple[tuple[str, Mapping[str, object]], ...] = ()  # what was applied, in order, with all options
    built: ModelConfig | None = None  # the architecture that its passes began with; None: the model's own
    name: str = ""  # where it came from, for people

    @property
    def config(self):
        """The model's architecture."""
        return self.model.config

    def replace(self, **changes) -> "Program":
        """Return a program with some fields changed."""
        return dataclasses.replace(self, **changes)


Pass = Callable[[Program], Program]


def chain(*passes: Pass) -> Pass:
    """Return the pass that applies `passes` from left to right."""

    def apply(program: Program) -> Program:
        for p in passes:
            program = p(program)
        return program

    return apply
