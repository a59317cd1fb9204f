"""How a quantized product on TPU is cut: chunks of an output's bytes, written out or in the turns of a loop."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import calls, chips
from pallas_kernels.quantized_matmul.reference import FOUR_BIT

HALF = 64  # bytes whose low and high nibbles make one push of 128
TURN = 32  # chunks of a turn of the loop over many: a turn waits some 500 cycles, and all written out compile for long


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut: `chunks` of `lanes` bytes of each output, with `groups` groups of inputs in each."""

    qtype: str
    integer: bool  # the MXU multiplies int8; else bfloat16
    rounded: bool  # x is taken as integers of a step
    parts: int  # int8 or bfloat16 numbers that make a number of x
    planes: int  # codes in a byte
    lanes: int
    bytes: int  # of an output
    chunks: int
    groups: int
    grouped: bool  # each group has a scale of its own, and not all inputs one
    scales: int  # G, or of some chunks
    rows: int

    @property
    def inputs(self) -> int:
        """Inputs of a chunk."""
        return self.planes * self.lanes

    @property
    def group(self) -> int:
        """Inputs of a group, within a chunk."""
        return self.inputs // self.groups

    @property
    def turns(self) -> int:
        """Turns of a loop over chunks, of `TURN` each; 0 where all chunks are written out."""
        whole = min(self.bytes // self.lanes, self.scales // self.groups) // TURN
        return whole if self.grouped and whole > 1 else 0

    @property
    def turn(self) -> "Plan":
        """What a turn does."""
        return dataclasses.replace(self, chunks=TURN, bytes=TURN * self.lanes, scales=TURN * self.groups)

    @property
    def rest(self) -> "Plan":
        """What the turns leave, which is written out."""
        done = self.turns * TURN
        held, scales = self.bytes - done * self.lanes, self.scales - done * self.groups
        return dataclasses.replace(self, chunks=self.chunks - done, bytes=held, scales=scales)

    @property
    def enlarged(self) -> float:
        """How many times as large as the codes are the numbers that stand for them."""
        return 16.0 if self.qtype == "int4" else 1.0

    @property
    def lines(self) -> int:
        """Rows of x as the MXU is given them: of each part and group; at least a whole tile of bfloat16."""
        return calls.round_up(self.parts * self.groups * self.rows, 8 if self.integer else 16)

    @property
    def dtype(self):
        """What the MXU is given."""
        return jnp.int8 if self.integer else jnp.bfloat16


def cut(
    x: Array, values: Array, scale: Array, qtype: str, activations: str | None, chosen: dict[str, int], chip: chips.Chip
) -> Plan:
    """Return how the product is cut."""
    M, G = x.shape[0], scale.shape[0]
    planes = 2 if qtype in FOUR_BIT else 1
    rounds = activations == "int8"
    wide = x.dtype == jnp.float32  # three bfloat16 numbers hold one exactly, two bytes would not
    integer = chip.int8_ratio > 1 and (rounds or (planes == 2 and not wide))
    parts = 1 if rounds else 2 if integer else 3 if wide else 1
    held = values.shape[1]  # bytes of an output
    group = held // G  # bytes of a group
    if G == 1:
        # One step of x, and one sum, where nothing asks for more; else x has a step for each chunk.
        lanes = calls.round_up(held, 128) if rounds or not integer else chosen["lanes"]
        groups = 1
    elif planes == 2 and chosen["lanes"] == HALF and HALF % group == 0:
        lanes, groups = HALF, HALF // group
    else:
        lanes = math.lcm(group, 128)
        lanes *= max(1, min(chosen["lanes"], held) // lanes)
        groups = lanes // group
    rows = calls.round_up(min(M, chosen["rows"]), 8)
    return Plan(
        qtype, integer, rounds or integer, parts, planes, lanes, held, pl.cdiv(held, lanes), groups, G > 1, G, rows
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refs:
    """What the body reads and writes, of all chunks or of some; None is not there."""

    x: Any
    weights: list[Any]
    scale: Any
    offset: Any
    parts: Any
    step: Any
    sum: Any

    def of(self, at: Any, plan: Plan) -> "Refs":
        """Return what belongs to the chunks of `plan`, the first of which is number `at`."""
        groups = pl.ds(at * plan.groups, plan.chunks * plan.groups)
        scales = pl.ds(at * plan.groups, plan.scales)
        held = pl.ds(at * plan.lanes, plan.bytes)
        return Refs(
            self.x.at[:, pl.ds(at * plan.inputs, plan.chunks * plan.inputs)],
            [weight.at[:, held] for weight in self.weights],
            self.scale.at[scales],
            None if self.offset is None else self.offset.at[scales],
            self.parts.at[pl.ds(at, plan.chunks)],
            None if self.step is None else self.step.at[groups],
            None if self.sum is None else self.sum.at[groups],
        )


def each_turn(run: Callable[[Refs, Plan, Any], Any], refs: Refs, plan: Plan, carry: Any) -> Any:
    """Return what `run(refs, plan, carry)` makes of the carry for the chunks of each turn, and for those left."""
    if not plan.turns:
        return run(refs, plan, carry)
    carry = jax.lax.fori_loop(
        0, plan.turns, lambda i, carry: run(refs.of(i * TURN, plan.turn), plan.turn, carry), carry
    )
    return run(refs.of(plan.turns * TURN, plan.rest), plan.rest, carry) if plan.rest.chunks else carry
