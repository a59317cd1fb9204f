"""Efficient inference of large language models in JAX: stackable passes, measured honestly."""

from jaxinfer.errors import InputError as InputError
from jaxinfer.eval.perplexity import perplexity as perplexity
from jaxinfer.generate import Generation as Generation
from jaxinfer.generate import generate as generate
from jaxinfer.generate import generate_text as generate_text
from jaxinfer.generate import logits as logits
from jaxinfer.generate import stream_text as stream_text
from jaxinfer.loading import load as load
from jaxinfer.loading import save as save
from jaxinfer.program import Program as Program
from jaxinfer.program import chain as chain
from jaxinfer.session import Session as Session

__version__ = "0.1.0"
