"""One of several processes: perplexity, a comparison and a gradient step on their mesh, and alone; prints both."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.eval.agreement import Reference
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program
from jaxinfer.sharding import processes
from jaxinfer.sharding.mesh import make_mesh, parse_mesh, simulate_devices
from jaxinfer.sharding.shard import shard

CONFIG = tiny_config(num_layers=2, num_heads=8, num_kv_heads=4, windows=())
TEXT = (np.arange(120) * 5 % 96).tolist()


@jax.jit
def train(model, tokens):
    """Return the loss, and the model after one step of gradient descent."""

    def loss(model):
        cache = model.init_cache(*tokens.shape)
        logits = model.logits(model(tokens, cache)[0])[:, :-1]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=2)
        return -chosen.mean()

    value, gradient = jax.value_and_grad(loss)(model)
    return value, jax.tree.map(lambda w, g: w - 0.5 * g, model, gradient)


def measure(program: Program) -> dict:
    """Return what a program gives: tokens, perplexity, its distance from its int8 form, losses around a step."""
    rows = [[5, 6, 7], [1, 2, 3, 4], [9] * 5, [4, 8]]
    found = Reference(program, TEXT, 64, 2, False).compare(ji.apply(program, "int8"), False)
    tokens = np.array(TEXT[:96], np.int32).reshape(4, 24)
    first, model = train(program.model, tokens)
    second, _ = train(model, tokens)
    return {
        "tokens": ji.generate(program, rows, max_new_tokens=6, temperature=0.7).tokens.tolist(),
        "perplexity": ji.perplexity(program, TEXT, 64, batch_size=2),
        "kl": found.kl.value,
        "losses": [float(fetch(first)), float(fetch(second))],
    }


def main() -> None:
    """Print a line."""
    mesh = parse_mesh(sys.argv[2])
    processes.join(sys.argv[1])
    simulate_devices(mesh)
    program = random_program(CONFIG)
    divided = measure(shard(make_mesh(mesh))(program))
    if not processes.index():
        print(json.dumps({"alone": measure(program), "divided": divided}))


if __name__ == "__main__":
    main()
