"""How the GPU's quantized product is cut into blocks and steps, and what it refuses."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import calls, gpus
from pallas_kernels.quantized_matmul.gpu_registers import BANKS, CHUNK, LINE, Tile
from pallas_kernels.quantized_matmul.reference import FOUR_BIT, QTYPES

LETTERS = {"bfloat16": "bf16", "float16": "f16"}
MOST_ROWS = 64  # with more, the products take longer than the copies, and XLA makes them faster
CLUSTER = 8  # blocks at most
BARRIERS = 1024  # bytes of shared memory
SPARED = 12 * 1024  # bytes of half a processor's that the ring leaves: for scales, and for sums that meet


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is cut: `steps` of a tile's inputs in all, of which each of `splits` blocks has `each`."""

    tile: Tile
    stages: int
    steps: int
    each: int
    splits: int
    cluster: bool  # the blocks of a split are a cluster, and add up their sums themselves

    @property
    def parts(self) -> int:
        """Partial sums that are left to add up."""
        return 1 if self.cluster else self.splits


def plan_for(
    x: Any, values: Any, scale: Any, qtype: str, offset: bool, activations: str | None,
    blocks: dict[str, int] | None, gpu: gpus.Gpu,
) -> Plan:  # fmt: skip
    """Return how a product is cut.

    Raises:
        NotImplementedError: groups that fit no step.
        ValueError: blocks that need more shared memory than there is.
    """
    M, I = x.shape
    O, held = values.shape
    planes = 2 if qtype in FOUR_BIT else 1
    chosen = default_blocks(M, O, held, planes, gpu) | (blocks or {})
    rows, lines = calls.round_up(M, 8), chosen["lines"]
    G = scale.shape[0]
    group, chunks = I // G // (CHUNK * planes), lines * BANKS
    if G > 1 and chunks % group and group % chunks:
        inputs = chunks * CHUNK * planes
        raise NotImplementedError(f"groups of {I // G} inputs: must divide {inputs}, or be its multiple")
    tile = Tile(
        qtype, LETTERS[x.dtype.name], chosen["outputs"], rows, lines,
        segment=0 if G == 1 else min(group, chunks), group=group, offset=offset, rounded=activations == "int8",
    )  # fmt: skip
    steps = pl.cdiv(held, lines * LINE)
    each = pl.cdiv(steps, min(chosen["splits"], steps))
    splits = pl.cdiv(steps, each)
    plan = Plan(tile, min(chosen["stages"], each), steps, each, splits, bool(chosen["cluster"]) and splits <= CLUSTER)
    if (need := shared_bytes(plan)) > gpu.shared:
        raise ValueError(f"blocks={chosen}: need {need} bytes of shared memory, {gpu.name} has {gpu.shared} a block")
    return plan


def default_blocks(M: int, O: int, held: int, planes: int, gpu: gpus.Gpu) -> dict[str, int]:
    """Return blocks for M rows and O outputs of `held` bytes: up to two blocks a processor, all of them at once."""
    outputs = 64 if O <= 64 else 128
    splits = 2 * gpu.processors // pl.cdiv(O, outputs)
    splits = max(1, min(splits, CLUSTER, held // (4 * LINE)))
    stage = outputs * LINE + 2 * calls.round_up(M, 8) * LINE * planes
    stages = (gpu.shared // 2 - SPARED) // stage
    return {"outputs": outputs, "lines": 1, "stages": max(2, min(stages, 6)), "splits": splits, "cluster": 1}


def shared_bytes(plan: Plan) -> int:
    """Return the shared memory that a block takes: every array of it is of whole 1024 bytes."""
    tile, slots = plan.tile, plan.stages if plan.tile.segment else 1
    arrays = [
        plan.stages * tile.outputs * tile.lines * LINE,
        plan.stages * tile.rows * tile.inputs * 2,
        *[slots * tile.groups * tile.outputs * 4] * (1 + tile.offset),
        slots * tile.groups * tile.row_of_steps * 4 if tile.rounded else 0,
        4 * left_by(plan),
    ]
    return sum(calls.round_up(n, 1024) for n in arrays) + BARRIERS


def left_by(plan: Plan) -> int:
    """Return the floats that a block leaves for the others of its cluster, and some that nobody reads."""
    tile = plan.tile
    return 128 * calls.round_up(4 * tile.strips * tile.eights, plan.splits) if plan.cluster and plan.splits > 1 else 0


def check(x, values, scale, offset, qtype, activations) -> None:
    """Raise for what the contract does not allow, or the kernel does not know."""
    if qtype not in QTYPES:
        raise NotImplementedError(f"qtype={qtype!r}: must be one of {', '.join(QTYPES)}")
    if x.dtype.name not in LETTERS:
        raise NotImplementedError(f"x of {x.dtype}: must be bfloat16 or float16")
    if activations not in (None, "int8"):
        raise NotImplementedError(f"activations={activations!r}: must be None or 'int8'")
    M, I = x.shape
    O, held = values.shape
    G = scale.shape[0]
    planes = 2 if qtype in FOUR_BIT else 1
    if M > MOST_ROWS:
        raise NotImplementedError(f"{M} rows: at most {MOST_ROWS}")
    if held * planes != I or scale.shape[1] != O or I % G or (offset is not None and offset.shape != scale.shape):
        shapes = [v.shape for v in (x, values, scale, offset) if v is not None]
        raise ValueError(f"x, values, scale, offset of {shapes}: must be [M, I], [O, bytes], [G, O], [G, O]")
    if (I // G) % (CHUNK * planes):
        raise NotImplementedError(f"groups of {I // G} inputs: must be whole {CHUNK * planes} of them")
    if scale.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"scales of {scale.dtype}: must be float32 or bfloat16")
