"""Which layers a model can do without, by trying: the ones of least influence first, then swaps that make it better.

A set is judged by how the model without these layers agrees with the whole model on a text: the share of tokens where
both find the same next token most likely (what a greedy draft needs, 2309.08168), the divergence, or the perplexity.
"""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Literal

from tqdm import tqdm

from jaxinfer.errors import InputError
from jaxinfer.eval.agreement import Reference
from jaxinfer.eval.journal import Journal
from jaxinfer.passes import apply
from jaxinfer.passes.calibration import Calibration
from jaxinfer.passes.depth.influence import block_influence
from jaxinfer.passes.depth.skip_layers import least
from jaxinfer.program import Program

Objective = Literal["agreement", "kl", "perplexity"]
OBJECTIVES = ("agreement", "kl", "perplexity")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A set of layers left out, and what is left of the model."""

    layers: tuple[int, ...]
    agreement: float  # share of tokens where the whole model finds the same next token most likely
    kl: float  # of the whole model's predictions from these, nats a token
    perplexity: float

    def better(self, other: "Trial", objective: Objective) -> bool:
        """Return whether it is better than another by `objective`."""
        sign = 1 if objective == "agreement" else -1
        return sign * getattr(self, objective) > sign * getattr(other, objective)


@dataclasses.dataclass(frozen=True)
class Search:
    """A finished search: the best set, the one of least influence that it began with, and how many were tried."""

    best: Trial
    start: Trial
    influence: tuple[float, ...]
    tried: int


def search_skips(
    program: Program,
    tokens: Sequence[int],
    count: int,
    budget: int,
    objective: Objective = "agreement",
    window: int = 256,
    seed: int = 0,
    journal: Journal | None = None,
    progress: bool = False,
) -> Search:
    """Return the best set of `count` layers to leave out that `budget` evaluations on `tokens` find.

    Hill climbing: from the layers of least block influence, one layer is swapped for another at random, and a swap
    that makes it better stays. Where all swaps are known, it goes on from a random set. The same seed tries the same
    sets, so `journal` lets a search that was stopped go on.

    Raises:
        InputError: a count or a budget out of its range, or a text that the model can't take.
    """
    L = len(program.model.layers)
    if not 0 < count < L:
        raise InputError(f"count={count}: must be in 1..{L - 1}: the model has {L} layers")
    if budget < 1:
        raise InputError(f"budget={budget}: must be 1 evaluation or more")
    window = min(window, len(tokens))
    influence = block_influence(program.model, Calibration.of(program, tokens, window=window))
    reference = None
    known: dict[tuple[int, ...], Trial] = {}
    best = start = None
    rng = random.Random(seed)
    sets = _sets(least(influence, count), L, count, known, rng)
    with tqdm(total=budget, unit="set", disable=not progress) as bar:
        current = next(sets)
        for i in range(budget):
            if journal is not None and i in journal.done:
                found = journal.done[i]
                trial = Trial(**{**found, "layers": tuple(found["layers"])})
            else:
                reference = reference or Reference(program, tokens, window)
                trial = _try(program, reference, current)
                if journal is not None:
                    journal.append(i, dataclasses.asdict(trial))
            known[trial.layers] = trial
            start = start or trial
            improved = best is None or trial.better(best, objective)
            best = trial if improved else best
            bar.set_postfix({objective: f"{getattr(best, objective):.4g}"})
            bar.update()
            try:
                current = sets.send((trial, objective))
            except StopIteration:  # there are no other sets
                break
    return Search(best, start, tuple(influence), len(known))


def _sets(first: tuple[int, ...], layers: int, count: int, known: dict, rng: random.Random) -> Iterator:
    """Yield the sets to try. Each is answered with its trial and the objective."""
    trial, objective = yield first
    here = trial
    while True:
        swaps = [
            tuple(sorted({*here.layers} - {out} | {new}))
            for out in here.layers
            for new in range(layers)
            if new not in here.layers
        ]
        fresh = [s for s in swaps if s not in known]
        if fresh:
            trial, objective = yield rng.choice(fresh)
            here = trial if trial.better(here, objective) else here
            continue
        others = (tuple(sorted(rng.sample(range(layers), count))) for _ in range(1000))
        other = next((s for s in others if s not in known), None)
        if other is None:
            return
        here, objective = yield other


def _try(program: Program, reference: Reference, layers: tuple[int, ...]) -> Trial:
    found = reference.compare(apply(program, ("skip_layers", {"layers": layers})))
    return Trial(layers, found.top1.value, found.kl.value, found.perplexity.value)
