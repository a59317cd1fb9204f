"""Show what outlier channels do to quantization, on a model that is the same function with and without them.

    python scripts/outlier_demo.py MODEL --text FILE --calibrate FILE [--factor 100] [--channels 6] [--tokens 8192]

Small models have weak outliers. Here some channels of what the norms write are multiplied by `factor`, and the weights
that read them divided: the logits stay, but rounding to nearest has to cover both sizes. Prints a table of
perplexities, without and with them, and how far the logits moved before any quantization. `--places qkv+gate_up+down`
puts them into the MLP's hidden layer too. Scaling undoes that as well; a rotation followed by 4-bit weights does not:
it spreads the large activations over weights of which the small ones, that should meet them, drown in rounding errors.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer as ji
from jaxinfer.eval.data import read_text
from jaxinfer.passes import apply
from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.quantization.rescaling import folds
from jaxinfer.program import Program
from jaxinfer.tree import replace

VARIANTS = (
    ("w8a8",),
    ("smoothquant:folds=qkv+gate_up+down",),
    ("llm_int8:features=16",),
    ("quarot", "w8a8"),
    ("int4",),
    ("awq",),
    ("gptq",),
    ("quarot", "int4"),
)


def inject(program: Program, factor: float, channels: int, places: Sequence[str], seed: int = 0) -> Program:
    """Return the program, the same function, with `channels` channels of each activation `factor` times as large.

    `places` names what reads them: qkv, gate_up, or down (not of experts).
    """
    layers = []
    for i, block in enumerate(program.model.layers):
        for j, fold in enumerate(folds(block, places)):
            size = program.config.mlp_dim if fold.name == "down" else program.config.embed_dim
            picked = np.random.default_rng([seed, i, j]).choice(size, channels, replace=False)
            block = fold.rescale(block, jnp.ones(size).at[picked].set(1 / factor))
        layers.append(block)
    return program.replace(model=replace(program.model, layers=layers))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="text to evaluate on")
    parser.add_argument("--calibrate", required=True, help="other text, to calibrate on")
    parser.add_argument("--factor", type=float, default=100.0)
    parser.add_argument("--channels", type=int, default=6)
    parser.add_argument("--places", default="qkv+gate_up", help="where: of qkv, gate_up, down")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text, to evaluate on")
    parser.add_argument("--windows", type=int, default=16, help="of calibration text")
    parser.add_argument("--window", type=int, default=512)
    args = parser.parse_args(argv)

    plain = ji.load(args.model, dtype="float32")
    window = min(args.window, plain.config.max_context)
    tokens = plain.tokenizer.encode(read_text(args.text)[: 8 * args.tokens])[: args.tokens]
    other = plain.tokenizer.encode(read_text(args.calibrate)[: 8 * args.windows * window])
    uneven = inject(plain, args.factor, args.channels, args.places.split("+"))
    few = jnp.asarray([tokens[:64]])
    moved = jnp.abs(_logits(uneven.model, few) - _logits(plain.model, few)).max()
    print(f"largest difference of a logit after the injection: {float(moved):.1e}")
    print("| passes | perplexity | with outliers |\n|---|---|---|")
    for passes in ((), *VARIANTS):
        row = []
        for program in (plain, uneven):
            text = Calibration.of(program, other, windows=args.windows, window=window)
            row.append(ji.perplexity(apply(program, *passes, calibration=text), tokens, window=window))
        print(f"| {' + '.join(passes) or 'none'} | {row[0]:.2f} | {row[1]:.2f} |", flush=True)
    return 0


@jax.jit
def _logits(model, tokens):
    hidden, _ = model(tokens, model.init_cache(*tokens.shape))
    return model.logits(hidden)


if __name__ == "__main__":
    sys.exit(main())
