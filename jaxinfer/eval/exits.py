"""What leaving early really saves: layers that a batch still runs, FLOPs, and time beside the model that runs them all.

A token that has left saves nothing where another row of its batch still needs the layer, and asking whether it may
leave costs as well. Both are counted, and the time is measured, in turns with the full model on the same tokens.
"""

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from tqdm import tqdm

from jaxinfer import tree
from jaxinfer.decode import loop
from jaxinfer.errors import InputError
from jaxinfer.eval.speed import Rate, latency
from jaxinfer.models.moe import MoE
from jaxinfer.models.transformer import Transformer, abstract
from jaxinfer.passes.depth.criteria import Entropy, Gap, Patience
from jaxinfer.passes.depth.early_exit_nodes import EarlyExit
from jaxinfer.passes.depth.skip_decode import ByPosition
from jaxinfer.program import Program


@dataclasses.dataclass(frozen=True)
class Exits:
    """One batch size: single tokens of a text, one a step and row."""

    batch: int
    steps: int
    layers: int  # of the full model
    depth: float  # layers that a token needed, the mean
    ran: float  # layers that a step ran: the most that a row of it needed, the mean
    flops: float  # of the steps, as a share of the full model's
    same: float  # share of tokens where both find the same next token most likely
    seconds: Rate  # of a step; the ratio says how many times as fast as the full model it was
    histogram: tuple[int, ...]  # tokens that needed 0, 1, 2, ... layers


def measure_exits(
    full: Program,
    program: Program,
    tokens: Sequence[int],
    batches: Sequence[int] = (1, 4, 16),
    prompt_tokens: int = 64,
    steps: int = 64,
    rounds: int = 3,
    progress: bool = False,
) -> list[Exits]:
    """Return what `program` saves of `full`, for every batch size: after a prompt, tokens of a text are fed one by one.

    Row b of a batch is the text's piece number b. Times alternate, in the opposite order every second round.

    Raises:
        InputError: a number below 1, a text that is too short, or pieces that do not fit the context.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("steps", steps), ("rounds", rounds), *(
        ("batch", b) for b in batches
    )):  # fmt: skip
        if value < 1:
            raise InputError(f"{name}={value}: must be 1 or more")
    piece, limit = prompt_tokens + steps, full.config.max_context
    if piece > limit:
        raise InputError(f"{prompt_tokens} prompt tokens and {steps} steps: the model's context is {limit}")
    if len(tokens) < piece * max(batches):
        raise InputError(
            f"a text of {len(tokens)} tokens: a batch of {max(batches)} takes {piece * max(batches)}; give a longer "
            "text, smaller --batches or fewer --steps"
        )
    rows = np.asarray(tokens[: piece * max(batches)], np.int32).reshape(-1, piece)
    found = []
    for batch in tqdm(batches, unit="batch", disable=not progress):
        found.append(_measure(full, program, rows[:batch], prompt_tokens, rounds))
    return found


def _measure(full: Program, program: Program, rows: Int[np.ndarray, "B n"], prompt: int, rounds: int) -> Exits:
    times: dict[str, list[float]] = {"full": [], "exits": []}
    walks = {}
    for i in range(rounds + 1):  # the first compiles and is not counted
        for name, of in (("full", full), ("exits", program))[:: -1 if i % 2 else 1]:
            seconds, walks[name] = _walk(of.model, rows, prompt)
            if i:
                times[name].append(seconds / (rows.shape[1] - prompt))
    depth, ran, best = walks["exits"]
    steps, batch = depth.shape
    layers = len(full.model.layers)
    at = prompt + np.arange(steps)
    counted = [
        sum(step_flops(p, r, context) for r, context in zip(w[1], at, strict=True))
        for p, w in ((program, walks["exits"]), (full, walks["full"]))
    ]
    return Exits(
        batch=batch,
        steps=steps,
        layers=layers,
        depth=float(depth.mean()),
        ran=float(ran.sum(axis=1).mean()),
        flops=counted[0] / counted[1],
        same=float((best == walks["full"][2]).mean()),
        seconds=latency(times["exits"], times["full"]),
        histogram=tuple(np.bincount(depth.reshape(-1), minlength=layers + 1).tolist()),
    )


def step_flops(program: Program, ran: Bool[np.ndarray, "n"], context: int | np.integer) -> float:
    """Return the FLOPs of one row of a step after `context` tokens in which the layers `ran` were run.

    `2 * matrix entries + 4 N H tokens in sight` of a layer that ran; of another its key and value projections where
    the model has tokens leave; the logits, once for the step and once for every exit that reads them.
    """
    c, model = program.config, program.model
    total = 2.0 * c.vocab_size * c.embed_dim
    for i, layer in enumerate(abstract(c).layers):
        if ran[i]:
            seen = context + 1 if c.window(i) is None else min(context + 1, c.window(i))
            total += 2 * _entries(layer) + 4 * c.num_heads * c.head_dim * seen
        elif isinstance(model, EarlyExit):
            total += 4 * c.embed_dim * c.num_kv_heads * c.head_dim
        if isinstance(model, EarlyExit) and i + 1 in model.exits and ran[i]:
            reads = isinstance(model.criterion, (Gap, Entropy, Patience))
            total += 2 * c.embed_dim * (c.vocab_size if reads else 1)
    return total


def _entries(layer) -> float:
    """Return the matrix entries that a token is multiplied with; of experts those that it is sent to."""
    entries = sum(leaf.size for leaf in jax.tree.leaves(layer) if len(leaf.shape) > 1)
    for node in tree.select(layer, MoE).values():
        experts = sum(leaf.size for leaf in jax.tree.leaves([node.gate, node.up, node.down]))
        entries -= experts * (1 - node.experts_per_token / node.gate.kernel.shape[0])
    return float(entries)


def _walk(model: Transformer, rows: Int[np.ndarray, "B n"], prompt: int) -> tuple[float, tuple[np.ndarray, ...]]:
    """Return the seconds that the steps after the prompt took, and what `_steps` found."""
    cache = loop.empty_cache(model, len(rows), loop.slots_for(rows.shape[1]))
    cache, _ = loop.prefill(model, cache, rows[:, :prompt].tolist())
    fed = jnp.asarray(rows[:, prompt:].T)
    jax.block_until_ready((cache, fed))
    begin = time.perf_counter()
    found = jax.block_until_ready(_steps(model, cache, fed))
    return time.perf_counter() - begin, tuple(np.asarray(x) for x in found)


@jax.jit
def _steps(
    model: Transformer, cache, tokens: Int[Array, "n B"]
) -> tuple[Int[Array, "n B"], Bool[Array, "n L"], Int[Array, "n B"]]:
    """Return of every step: the layers that each row needed, which layers ran, and the likeliest next tokens."""
    counts = jnp.ones(tokens.shape[1:], jnp.int32)

    def step(cache, fed):
        x, after, depth, ran = _trace(model, model.embed(fed[:, None]), cache, counts)
        best = jnp.argmax(model.logits(model.final_norm(x))[:, 0], axis=-1).astype(jnp.int32)
        return after.longer(counts), (depth, ran, best)

    return jax.lax.scan(step, cache, tokens)[1]


def _trace(model: Transformer, x: Float[Array, "B 1 D"], cache, counts: Int[Array, "B"]):
    """Run the layers, and tell how many each row needed and which of them ran."""
    L = len(model.layers)
    if isinstance(model, EarlyExit):
        x, cache, depth, _ = model.trace(x, cache, counts)
        return x, cache, depth[:, 0], jnp.arange(L) < depth.max()
    x, after, _ = model.run_layers(x, cache, counts)
    needed = jnp.ones((len(counts), L), bool)
    if isinstance(model, ByPosition):
        limits = jnp.array([model.config.max_context if n is None else n for n in model.limits])
        needed = cache.length[:, None] < limits
    return x, after, needed.sum(axis=1, dtype=jnp.int32), needed.any(axis=0)
