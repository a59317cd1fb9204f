"""Efficient inference of large language models in JAX: stackable passes, measured honestly."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.errors import InputError
    from jaxinfer.eval.perplexity import perplexity
    from jaxinfer.generation import Generation, generate, generate_text, logits, stream_text
    from jaxinfer.loading import load, save
    from jaxinfer.passes import apply
    from jaxinfer.passes.calibration import Calibration
    from jaxinfer.program import Program, chain
    from jaxinfer.session import Session
    from jaxinfer.sharding.shard import shard
    from jaxinfer.speculation import speculative

__version__ = "0.1.0"

# Imported when first used, so that `jaxinfer --help` does not wait for JAX.
_HOME = {
    "InputError": "errors",
    "perplexity": "eval.perplexity",
    "Generation": "generation",
    "generate": "generation",
    "generate_text": "generation",
    "logits": "generation",
    "stream_text": "generation",
    "load": "loading",
    "save": "loading",
    "apply": "passes",
    "Calibration": "passes.calibration",
    "Program": "program",
    "chain": "program",
    "Session": "session",
    "shard": "sharding.shard",
    "speculative": "speculation",
}
__all__ = [  # noqa: RUF022 - in the order of use
    "load", "apply", "Calibration", "save", "generate_text", "stream_text", "generate", "Generation", "logits",
    "perplexity", "Program", "chain", "speculative", "shard", "Session", "InputError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"jaxinfer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
