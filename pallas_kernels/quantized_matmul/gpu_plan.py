"""How the GPU's quantized product is cut into blocks and steps, and what it refuses."""

import contextlib
import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import calls, gpus, tuning
from pallas_kernels.quantized_matmul import gpu_sums
from pallas_kernels.quantized_matmul.gpu_tile import BANKS, CHUNK, LINE, Tile
from pallas_kernels.quantized_matmul.reference import FOUR_BIT, QTYPES

LETTERS = {"bfloat16": "bf16", "float16": "f16"}
MOST_ROWS = 64  # with more, the products take longer than the copies: the larger matrix instruction makes them
CLUSTER = 8  # blocks at most
MOST_SPLITS = 8
BARRIERS = 1024  # bytes of shared memory
KEPT_BACK = 1024  # bytes of shared memory of each block that it cannot have
ALIGNED = 1024  # bytes: where a swizzle begins
COPIED = 128  # bytes: where a copy to shared memory may begin
MOST_OUTPUTS = 128  # of a block, as registers allow


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

    @property
    def left(self) -> int:
        """Floats that a block leaves in the ring's place for its other warps, or for the others of its cluster."""
        return gpu_sums.left_by(self.tile, self.splits if self.cluster else 1)


def plan_for(
    x: Any, values: Any, scale: Any, qtype: str, offset: bool, activations: str | None,
    blocks: dict[str, int] | None, gpu: gpus.Gpu,
) -> Plan:  # fmt: skip
    """Return how a product is cut.

    Raises:
        NotImplementedError: groups that fit no step.
        ValueError: blocks of which warps have no whole part, or that need more shared memory than there is.
    """
    cut = functools.partial(_cut, x, values, scale, qtype, offset, activations, gpu)
    usual = default_blocks(x.shape[0], *values.shape, gpu) | {"cluster": 0}
    if blocks:
        return cut(usual | blocks, "stages" in blocks)
    shape = block_class(x, values, scale, qtype=qtype, activations=activations)
    tuned = tuning.gpu_blocks("quantized_matmul", gpu.name, shape)
    if tuned and "rows" not in tuned:
        with contextlib.suppress(NotImplementedError, ValueError):  # measured for a near shape, they may not fit here
            return cut(usual | {"resident": 1} | tuned, False)
    return cut(usual, False)


def _cut(
    x: Any, values: Any, scale: Any, qtype: str, offset: bool, activations: str | None, gpu: gpus.Gpu,
    chosen: dict[str, int], as_given: bool,
) -> Plan:  # fmt: skip
    """Return how a product is cut into the blocks that are chosen, `as_given` or with as many stages as fit."""
    M, I = x.shape
    O, held = values.shape
    planes = 2 if qtype in FOUR_BIT else 1
    lines, deep = chosen["lines"], chosen["deep"]
    chosen["outputs"] = chosen["outputs"] or even_outputs(O, gpu)
    if lines not in (1, 2, 4) or deep not in (1, 2, 4) or chosen["outputs"] * deep % 64:
        raise ValueError(f"blocks={chosen}: lines and deep must be 1, 2 or 4, and outputs * deep a multiple of 64")
    G = scale.shape[0]
    group, chunks = I // G // (CHUNK * planes), lines * BANKS
    if G > 1 and chunks % group and group % chunks:
        inputs = chunks * CHUNK * planes
        raise NotImplementedError(f"groups of {I // G} inputs: must divide {inputs}, or be its multiple")
    segment = min(group, chunks // deep) if G > 1 else (planes == 2) * chunks // deep
    tile = Tile(
        qtype, LETTERS[x.dtype.name], chosen["outputs"], _rows(M, lines * LINE * planes), lines, deep,
        segment=segment, group=group, whole=G == 1, offset=offset, rounded=activations == "int8",
    )  # fmt: skip
    kept = tile.groups * tile.outputs * scale.dtype.itemsize
    if not tile.whole and kept % COPIED:
        raise ValueError(f"blocks={chosen}: {kept} bytes of scales a step, must be whole {COPIED}")
    steps = pl.cdiv(held, lines * LINE)
    each = pl.cdiv(steps, min(chosen["splits"], steps))
    splits = pl.cdiv(steps, each)
    cluster = bool(chosen["cluster"]) and 1 < splits <= CLUSTER
    left = 4 * gpu_sums.left_by(tile, splits if cluster else 1)
    least = pl.cdiv(left, lines * LINE * tile.outputs)
    plan = Plan(tile, max(min(chosen["stages"], each), least), steps, each, splits, cluster)
    while not as_given and plan.stages > max(2, least) and resident(plan, gpu) < chosen["resident"]:
        plan = dataclasses.replace(plan, stages=plan.stages - 1)
    if (need := shared_bytes(plan)) > gpu.shared:
        raise ValueError(f"blocks={chosen}: need {need} bytes of shared memory, {gpu.name} has {gpu.shared} a block")
    return plan


def block_class(
    x: Any, values: Any, scale: Any, *, qtype: str, activations: str | None = None, **_: Any
) -> dict[str, int | str]:
    """Return the key of the table of blocks: the form and about how many rows, inputs a group, inputs and outputs."""
    M, I = x.shape
    rows = next((most for most in (1, 8, 16, MOST_ROWS, 256) if most >= M), 1024)
    form = f"{qtype}_{activations or jnp.dtype(x.dtype).name}_m{rows}"
    return {"form": form, "group": I // scale.shape[0], "I": I, "O": values.shape[0]}


def _rows(M: int, inputs: int) -> int:
    """Return how many rows of x a stage holds: a power of two, or whole eights; a stage's are whole 1024 bytes."""
    power = 1 << (M - 1).bit_length()
    return max(power, ALIGNED // 2 // inputs) if power < 8 else calls.round_up(M, 8)


def default_blocks(M: int, O: int, held: int, gpu: gpus.Gpu) -> dict[str, int]:
    """Return blocks for M rows and O outputs of `held` bytes: all of them at once, of small products.

    Of few rows the warps of a block share outputs, and as many as `resident` blocks fit a processor, with as many
    stages as leave room for them; of many rows each warp has its own outputs.
    """
    if M == 1:
        outputs, lines, deep, resident = 64, 2, 4, 4
    elif M <= 16:
        outputs, lines, deep, resident = 128, 1, 2, 3
    else:
        outputs, lines, deep, resident = 128, 1, 1, 2
    room = resident * gpu.processors // pl.cdiv(O, outputs)
    splits = max(1, min(room, MOST_SPLITS, pl.cdiv(held, lines * LINE)))
    return {"outputs": outputs, "lines": lines, "deep": deep, "stages": 6, "splits": splits, "resident": resident}


def even_outputs(O: int, gpu: gpus.Gpu) -> int:
    """Return the outputs of a block with which every processor has as many blocks, with no splits to add up."""
    rounds = pl.cdiv(O, MOST_OUTPUTS * gpu.processors)
    return calls.round_up(pl.cdiv(O, rounds * gpu.processors), 16)


def shared_bytes(plan: Plan) -> int:
    """Return the shared memory that a block takes: every array of it is of whole 1024 bytes."""
    tile, slots = plan.tile, 1 if plan.tile.whole else plan.stages
    arrays = [
        plan.stages * tile.outputs * tile.lines * LINE,
        plan.stages * tile.rows * tile.inputs * 2,
        *[slots * tile.groups * tile.outputs * 4] * (1 + tile.offset),
        slots * tile.groups * tile.row_of_steps * 4 if tile.rounded else 0,
    ]
    return sum(calls.round_up(n, ALIGNED) for n in arrays) + BARRIERS


def resident(plan: Plan, gpu: gpus.Gpu) -> int:
    """Return how many blocks a processor's shared memory holds."""
    return (gpu.shared + KEPT_BACK) // (shared_bytes(plan) + KEPT_BACK)


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
    if M > MOST_ROWS and activations is not None:
        raise NotImplementedError(f"{M} rows of integers: at most {MOST_ROWS}")
    if held * planes != I or scale.shape[1] != O or I % G or (offset is not None and offset.shape != scale.shape):
        shapes = [v.shape for v in (x, values, scale, offset) if v is not None]
        raise ValueError(f"x, values, scale, offset of {shapes}: must be [M, I], [O, bytes], [G, O], [G, O]")
    if (I // G) % (CHUNK * planes):
        raise NotImplementedError(f"groups of {I // G} inputs: must be whole {CHUNK * planes} of them")
    if scale.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"scales of {scale.dtype}: must be float32 or bfloat16")
