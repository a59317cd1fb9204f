"""How a step goes through the stages of a mesh: in turns, of which each stage works in some.

The embedding and the head are on all devices and run once, before and after. Without stages all is one part.
"""

import dataclasses

from jaxinfer.plan.building import Built
from jaxinfer.plan.counts import Work, count
from jaxinfer.plan.hardware import Hardware
from jaxinfer.plan.prediction import Times, predict
from jaxinfer.sharding.stages import pieces_of


@dataclasses.dataclass(frozen=True)
class Turns:
    """A step's tokens in pieces, which follow one another from stage to stage."""

    stages: int
    pieces: int

    @property
    def count(self) -> int:
        """Turns until the last piece has been in all stages."""
        return self.pieces + self.stages - 1


def turns_of(built: Built, rows: int, tokens: int) -> Turns:
    """Return how so many new tokens of each row go through the stages."""
    if built.stages == 1:
        return Turns(1, 1)
    return Turns(built.stages, pieces_of(rows, tokens, built.sizes, built.rules, chain=True))


@dataclasses.dataclass(frozen=True)
class Step:
    """What a device does in a step, part by part, and for how many turns' time each part keeps the step.

    The turns' time is that of the stage with the newest piece, which attends to the most. Turns without a piece of a
    stage's own are no work of it.
    """

    parts: tuple[tuple[Work, int], ...]

    @property
    def work(self) -> Work:
        """All that a device does."""
        first, *rest = (work for work, _ in self.parts)
        return sum(rest, first)

    def times(self, network: float | int, hardware: Hardware, launches: float | int = 0.0) -> Times:
        """Return the times of the step, whose collectives take `network` seconds, and which has so many launches."""
        total = Times(0.0, 0.0, network, 0.0, launches * hardware.launch)
        for work, turns in self.parts:
            for _ in range(turns):
                total += predict(work, 0.0, hardware)
        return total


def step_of(built: Built, rows: int, tokens: int, before: int, context: int = 0) -> Step:
    """Return the step in which each of `rows` rows gets `tokens` new tokens after `before` old ones; see `count`."""
    turns = turns_of(built, rows, tokens)
    if turns.stages == 1:
        return Step(((count(built, rows, tokens, before, context), 1),))
    each = tokens // turns.pieces
    ends = count(built, rows, tokens, before, context, layers=False)
    pieces = [count(built, rows, each, before + i * each, context, ends=False) for i in range(turns.pieces)]
    return Step(((ends, 1), *((work, 1) for work in pieces[:-1]), (pieces[-1], turns.stages)))
