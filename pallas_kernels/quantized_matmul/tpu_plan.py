"""How a quantized product on TPU is cut: chunks of an output's bytes, written out or in the turns of a loop."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from pallas_kernels import calls, chips, compat, tuning
from pallas_kernels.quantized_matmul.reference import FOUR_BIT

HALF = 64  # bytes whose low and high nibbles make one push of 128
LEAST = {"outputs": 128, "copies": 1}  # of a step: one tile of lanes
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
    rows: int  # of x in a block
    outputs: int  # of a copy
    copies: int  # of a step

    @property
    def inputs(self) -> int:
        """Inputs of a chunk."""
        return self.planes * self.lanes

    @property
    def width(self) -> int:
        """Inputs of all chunks: those of x, and zeros behind them."""
        return self.chunks * self.inputs

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
    M, G, O = x.shape[0], scale.shape[0], values.shape[0]
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
    outputs = calls.round_up(min(chosen["outputs"], O), 128)
    copies = max(1, min(chosen["copies"], pl.cdiv(O, outputs)))
    return Plan(
        qtype, integer, rounds or integer, parts, planes, lanes, held, pl.cdiv(held, lanes), groups, G > 1, G, rows,
        outputs, copies,
    )  # fmt: skip


def fitting(
    x: Array, values: Array, scale: Array, offset: Array | None, qtype: str, activations: str | None,
    tuned: dict[str, int], chip: chips.Chip,
) -> Plan:  # fmt: skip
    """Return how the product is cut by the tuned blocks, or by smaller ones where x or the outputs are wider.

    Raises:
        NotImplementedError: the least blocks need more VMEM than the chip gives a kernel.
    """

    def plan(blocks: dict[str, int]) -> Plan:
        return cut(x, values, scale, qtype, activations, blocks, chip)

    def need(blocks: dict[str, int]) -> int:
        found = plan(blocks)
        buffers = layout(found, x, values, offset, chip)
        return calls.vmem_bytes(
            arrays=operands(found, x, values, scale, offset),
            **{name: buffers[name] for name in ("in_specs", "out_specs", "out_shape", "scratch")},
        )

    def fits(blocks: dict[str, int]) -> bool:
        return need(blocks) <= chip.vmem_limit

    def leaves_room(blocks: dict[str, int]) -> bool:
        # At most 3/4 for the outputs, twice for the pipeline and two bytes an entry, as `calls.vmem_bytes` counts them.
        return 4 * blocks["outputs"] * blocks["copies"] * values.shape[1] <= chip.vmem_limit * 3 // 4 and fits(blocks)

    # Fewer rows read the weight more often: only where x, with its parts and steps, leaves no room for any outputs.
    blocks = tuning.halved(tuned, {"rows": 8, "lanes": HALF}, lambda b: fits(b | LEAST))
    blocks = tuning.halved(blocks, LEAST, leaves_room)
    if not fits(blocks):
        raise NotImplementedError(
            f"quantized_matmul: {x.shape[1]} inputs need {need(blocks) / 2**20:.1f} MiB of VMEM for 8 rows and 128 "
            f"outputs, and {chip.name} gives a kernel {chip.vmem_limit / 2**20:.0f} MiB; divide them over more devices"
        )
    return plan(blocks)


def operands(plan: Plan, x: Array, values: Array, scale: Array, offset: Array | None) -> list[Array]:
    """Return the arrays that the kernel is called with: the weight once for each copy of a step."""
    return [x, scale, *([] if offset is None else [offset]), *[values] * plan.copies]


def layout(plan: Plan, x: Array, values: Array, offset: Array | None, chip: chips.Chip) -> dict[str, Any]:
    """Return the grid, the blocks of operands and outputs, and the scratch, as `calls.call` takes them."""
    M, O = x.shape[0], values.shape[0]
    step, count = plan.outputs * plan.copies, pl.cdiv(O, plan.outputs)
    steps = pl.cdiv(count, plan.copies)
    cores = chip.cores if steps % chip.cores == 0 else 1
    steps //= cores

    def weight_at(copy):
        return lambda core, m, s: (jnp.minimum((core * steps + s) * plan.copies + copy, count - 1), 0)

    def out_at(core, m, s):
        return m, core * steps + s

    def scale_at(core, m, s):
        return 0, core * steps + s

    steps_of_x = plan.chunks * plan.groups
    return dict(
        out_shape=jax.ShapeDtypeStruct((M, O), x.dtype),
        grid=(cores, pl.cdiv(M, plan.rows), steps),  # what the last block holds past the last row stays in those rows
        in_specs=[
            pl.BlockSpec((plan.rows, plan.width), lambda core, m, s: (m, 0)),
            *(pl.BlockSpec((plan.scales, step), scale_at) for _ in range(1 if offset is None else 2)),
            *(pl.BlockSpec((plan.outputs, plan.bytes), weight_at(c)) for c in range(plan.copies)),
        ],
        out_specs=pl.BlockSpec((plan.rows, step), out_at),
        scratch=[
            compat.VMEM((plan.chunks, plan.lines, plan.inputs), plan.dtype),
            compat.VMEM((steps_of_x if plan.rounded else 1, plan.rows, 128), jnp.float32),
            compat.VMEM((1 if offset is None else steps_of_x, plan.rows, 128), jnp.float32),
        ],
    )


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
