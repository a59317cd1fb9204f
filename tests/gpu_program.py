"""Decodes with programs as a Hopper GPU would, its kernels run from their PTX on NumPy; in a process of its own.

    python tests/gpu_program.py FOLDER PASSES...    such as int8+kv_int4, or ngram:kv_int4 for drafts of prompt lookup

prints one JSON line a program: its tokens, those of XLA on this CPU, how far the prompt's logits are apart (a share of
the largest), and how often each kernel ran.
"""

import json
import os
import sys
from pathlib import Path

from pallas_kernels import cuda_compiler

sys.path += cuda_compiler.find()

import jax
import jax.numpy as jnp
import numpy as np
from models import random_program, tiny_config

import jaxinfer as ji
from jaxinfer.decode.sampling import Sampling
from jaxinfer.program import Program
from jaxinfer.session import Session
from pallas_kernels import aot_gpu, gpus
from pallas_kernels.ptx.run import emulated, environment

NEW = 4
CONFIG = tiny_config(
    vocab_size=512, embed_dim=256, mlp_dim=512, head_dim=64, windows=(48, None), max_context=1024
)  # sizes that the kernels take


def program_of(text: str) -> Program:
    """Return a small program in bfloat16 under passes."""
    drafter = "ngram" if text.startswith("ngram:") else None
    passes = text.removeprefix("ngram:")
    base = random_program(CONFIG)
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, base.model)
    program = ji.apply(base.replace(model=model), *passes.split("+"))
    return ji.speculative(program, drafter) if drafter else program


def decoded(program: Program) -> tuple[list[list[int]], np.ndarray]:
    """Return what two prompts of different lengths are continued by, and the logits after them."""
    rng = np.random.default_rng(0)
    session = Session(program, 2)
    session.feed([rng.integers(0, CONFIG.vocab_size, 25).tolist() * 8, rng.integers(0, 512, 131).tolist()], room=64)
    logits = np.asarray(session._logits, np.float32)
    tokens: list[list[int]] = [[], []]
    for part in session.decode(NEW, sampling=Sampling(temperature=0.0)):
        for row, new in zip(tokens, part, strict=True):
            row += map(int, new)
    return tokens, logits


def main(folder: Path, texts: list[str]) -> None:
    device, elsewhere = aot_gpu.device(), jax.lax.platform_dependent
    for text in texts:
        program = program_of(text)
        expected, logits = decoded(program)
        jax.clear_caches()
        jax.lax.platform_dependent = lambda *x, default=None, **here: here.get("cuda", default)(*x)
        try:
            with gpus.assume("h100"), emulated(device, folder / "dump") as emulation:
                found, near = decoded(program)
        finally:
            jax.lax.platform_dependent = elsewhere
            jax.clear_caches()
        error = float(np.abs(near - logits).max() / np.abs(logits).max())
        line = {"passes": text, "tokens": found, "expected": expected, "error": error, "kernels": emulation.runs}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    os.environ |= environment(Path(sys.argv[1]) / "dump")
    main(Path(sys.argv[1]), sys.argv[2:])
