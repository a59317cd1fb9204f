"""Programs whose activations have channels of very different sizes, and the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
from models import random_program, tiny_config

from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.passes.quantization.rescaling import FOLDS, folds
from jaxinfer.program import Program
from jaxinfer.tree import replace


def uneven_program(layouts=("fused",), spread: float = 1.0, places=FOLDS, **config) -> Program:
    """Return a random program, its activations' channels multiplied by about `e^(+-spread)` and its weights divided."""
    program = random_program(tiny_config(**config))
    layers = []
    for i, block in enumerate(program.model.layers):
        block = apply_layouts(block, layouts)
        for j, fold in enumerate(folds(block, places)):
            key = jax.random.fold_in(jax.random.key(i), j)
            block = jax.jit(lambda block, fold=fold, key=key: fold.rescale(block, _factors(block, fold, key, spread)))(
                block
            )
        layers.append(block)
    return program.replace(model=replace(program.model, layers=layers))


def _factors(block, fold, key, spread):
    reader = block
    for name in fold.readers[0].split("."):
        reader = getattr(reader, name)
    if fold.name == "o":
        shape = (block.attention.num_kv_heads * block.attention.head_dim,)
    elif fold.name == "down":
        shape = reader.kernel.shape[:2] if reader.kernel.ndim == 3 else (48,)
    else:
        shape = (32,)
    return jnp.exp(spread * jax.random.normal(key, shape))


def random_text(program: Program, windows: int = 16, window: int = 24) -> Calibration:
    """Return windows of random tokens to calibrate on."""
    tokens = np.random.default_rng(0).integers(0, program.config.vocab_size, windows * window)
    return Calibration.of(program, tokens.tolist(), windows=windows, window=window, batch_size=windows)


def logits(program: Program, tokens) -> np.ndarray:
    """Return the logits of whole rows of tokens."""
    return np.asarray(_logits(program.model, jnp.asarray(tokens)))


@jax.jit
def _logits(model, tokens):
    hidden, _ = model(tokens, model.init_cache(*tokens.shape))
    return model.logits(hidden)


def lost(program: Program, exact: np.ndarray, tokens) -> float:
    """Return the mean squared error of the logits."""
    return float(np.square(logits(program, tokens) - exact).mean())
