"""Speculation whose drafts stand by a chance that is given: what its steps cost, without weights that mean anything.

What is checked, and how, is what speculation always checks; only the verdict is drawn. So the time of a step is the
real one, and tokens a step follow `(1 - a^(g+1)) / (1 - a)` for drafts of g tokens of which each stands with chance a
(2211.17192). The text is of no meaning, as that of random weights is anyway.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key

from jaxinfer.decode.base import Autoregressive, State
from jaxinfer.decode.draft import Draft, Known, Outcome
from jaxinfer.decode.speculative import Speculative
from jaxinfer.decode.verification import chain
from jaxinfer.errors import InputError
from jaxinfer.eval.spec_bench import Bench
from jaxinfer.models.transformer import Transformer
from jaxinfer.program import Program

NAME = "synthetic"


@nnx.dataclass
class AnyTokens(nnx.Module):
    """Drafts tokens of no meaning, for next to nothing."""

    length: int = nnx.static(default=4, kw_only=True)

    def __post_init__(self):
        if self.length < 1:
            raise InputError(f"length={self.length}: must be 1 token or more")

    @property
    def parents(self) -> tuple[int, ...]:
        """A chain."""
        return chain(self.length)

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> None:
        """Nothing: it looks at no text."""

    def propose(
        self,
        model: Transformer,
        own: None,
        known: Known,
        state: State,
        keys: Key[Array, "B"],
        width: Int[Array, ""],
        laws: bool,
    ) -> tuple[Draft, None]:
        """Return tokens that depend on their places."""
        places = known.length[:, None] + jnp.arange(self.length)
        count = jnp.full_like(known.length, self.length)
        return Draft((places * 7919 % model.config.vocab_size).astype(jnp.int32), count), None

    def settle(self, own: None, known: Known, outcome: Outcome | None) -> None:
        """Nothing to forget."""


@nnx.dataclass
class SyntheticSpeculation(Speculative):
    """Speculation in which each token of a draft stands with chance `acceptance`, if those before it do."""

    acceptance: float = nnx.static(default=0.7, kw_only=True)

    @property
    def expected(self) -> float:
        """Tokens a step, where the whole draft is always checked."""
        return float(sum(self.acceptance**i for i in range(self.nodes + 1)))

    def _judge(self, logits, fed, count, parents, laws, state: State, keys) -> tuple[Array, Array, Array]:
        likely = jnp.argmax(logits, axis=2).astype(jnp.int32)
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (len(parents) - 1,)))(keys)
        stand = (drawn < self.acceptance) & (jnp.arange(len(parents) - 1) < count[:, None])
        last = jnp.cumprod(stand, axis=1).sum(axis=1).astype(jnp.int32)
        return likely, last, jnp.take_along_axis(likely, last[:, None], axis=1)[:, 0]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is measured: chances, the length of drafts and of random texts, and how many of these."""

    acceptance: Sequence[float]
    draft_length: int
    context: int
    texts: int
    new_tokens: int
    adapt: bool = True

    def __post_init__(self):
        for chance in self.acceptance:
            if not 0 <= chance <= 1:
                raise InputError(f"acceptance={chance}: must be from 0 to 1")


def measure(program: Program, shape: Shape) -> Iterator[dict[str, Any]]:
    """Yield a record a chance and text, as `jaxinfer spec-bench` has of questions: plainly and with drafts in turns.

    Raises:
        InputError: a chance that is none, no tokens, or more than the context holds.
    """
    plain = program.replace(decoder=Autoregressive(), stop_ids=())
    benches = {}
    for chance in shape.acceptance:
        decoder = SyntheticSpeculation(AnyTokens(length=shape.draft_length), adapt=shape.adapt, acceptance=chance)
        benches[chance] = Bench({"": plain, NAME: plain.replace(decoder=decoder)}, shape.new_tokens)
    for chance, bench in benches.items():
        for turn in range(shape.texts):
            ids = np.random.default_rng(turn).integers(0, program.config.vocab_size, shape.context).tolist()
            answers = bench.answer(ids, turn)
            yield {
                "category": f"{chance:g} stand",
                "prompt": len(ids),
                "answers": {name: dataclasses.asdict(a) for name, a in answers.items()},
                "gap": {NAME: 0.0},
                "synthetic": True,
            }
