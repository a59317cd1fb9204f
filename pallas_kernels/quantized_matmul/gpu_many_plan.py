"""How a product of many rows is cut into blocks on Hopper, and what the kernel refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import gpus
from pallas_kernels.calls import div, rem
from pallas_kernels.quantized_matmul.gpu_plan import LETTERS
from pallas_kernels.quantized_matmul.gpu_tile import Form

LINE = 64  # bytes of an output in a step
PART = 64  # inputs that become floats at a time: four steps of the matrix instruction
STRIP = 64  # outputs that the instruction takes
BESIDES = 4096  # bytes of shared memory for barriers
TOGETHER = 8  # blocks of rows that run beside each other: their x stays in the L2 cache, whatever there is of it


@dataclasses.dataclass(frozen=True)
class Plan(Form):
    """A block has `outputs`, in strips of 64 of which each of `groups` warpgroups has as many, and `rows` of x."""

    M: int  # rows of x
    I: int
    O: int
    outputs: int
    groups: int
    rows: int
    stages: int
    splits: int  # of the inputs over blocks
    group: int  # inputs that share a scale
    whole: bool  # there is one scale an output, and no offset: the sums are scaled
    offset: bool
    exact: bool  # scales are of x's dtype: codes are multiplied by them there, with the same result

    @property
    def inputs(self) -> int:
        """Inputs of a step."""
        return LINE * self.planes

    @property
    def strips(self) -> int:
        """Strips of outputs that a warpgroup has."""
        return self.outputs // STRIP // self.groups

    @property
    def words(self) -> int:
        """Words of codes of an output that a thread has in a part."""
        return 4 // self.planes

    @property
    def held(self) -> int:
        """Words that a thread takes of a part, with the scales and offsets of its outputs."""
        grids = 0 if self.whole else 2 if self.offset else 1
        return 2 * self.strips * (self.words + grids)

    @property
    def scales(self) -> int:
        """Rows of scales of a step."""
        return max(1, self.inputs // self.group)

    @property
    def steps(self) -> int:
        """Steps of all inputs."""
        return self.I // self.inputs

    @property
    def each(self) -> int:
        """Steps of a split; the last one has what is left."""
        return pl.cdiv(self.steps, self.splits)

    @property
    def tiles(self) -> tuple[int, int]:
        """Blocks of rows, and of outputs."""
        return pl.cdiv(self.M, self.rows), pl.cdiv(self.O, self.outputs)

    def at(self, index: Any) -> tuple[Any, Any]:
        """Return the block of rows and the block of outputs of a place: some blocks of rows go through all outputs."""
        rows, outputs = self.tiles
        first = div(index, TOGETHER * outputs) * TOGETHER
        within = rem(index, TOGETHER * outputs)
        count = jnp.minimum(TOGETHER, rows - first)
        return first + jax.lax.rem(within, count), jax.lax.div(within, count)

    def shared_bytes(self, scale_bytes: int, out_bytes: int) -> int:
        """Return the shared memory that a block takes."""
        kept = 0 if self.whole else self.scales * self.outputs * scale_bytes * (2 if self.offset else 1)
        stage = self.outputs * LINE + self.rows * self.inputs * 2 + kept
        return self.stages * stage + self.groups * STRIP * STRIP * out_bytes + BESIDES


def plan_for(x: Any, values: Any, scale: Any, qtype: str, offset: Any, blocks: dict[str, int], gpu: gpus.Gpu) -> Plan:
    """Return how a product is cut; `blocks` may say `outputs`, `rows`, `stages` and `splits`.

    Raises:
        NotImplementedError: sizes that fit no step.
        ValueError: blocks that are not to be had, or that need more shared memory than there is.
    """
    (M, I), O = x.shape, values.shape[0]
    chosen = default_blocks(M, I, O, gpu) | blocks
    if O == STRIP:  # copies by Mosaic have no coordinate where there is one tile: they would write the next one over it
        chosen["outputs"] = STRIP
    group, grids = I // scale.shape[0], [scale] if offset is None else [scale, offset]
    plan = Plan(
        qtype, LETTERS[x.dtype.name], M, I, O, chosen["outputs"], min(2, max(1, chosen["outputs"] // STRIP)),
        chosen["rows"], chosen["stages"], chosen["splits"], group, scale.shape[0] == 1 and offset is None,
        offset is not None, all(grid.dtype == x.dtype for grid in grids),
    )  # fmt: skip
    if I % plan.inputs or O % STRIP:
        raise NotImplementedError(f"{I} inputs, {O} outputs: must be multiples of {plan.inputs} and {STRIP}")
    if not plan.whole and (group % (16 * plan.planes) or (plan.inputs % group and group % plan.inputs)):
        raise NotImplementedError(f"groups of {group} inputs: must divide {plan.inputs}, or be multiples of that")
    fits = plan.outputs in (64, 128, 256) and plan.rows % STRIP == 0 < plan.rows * plan.strips <= 256
    need = plan.shared_bytes(scale.dtype.itemsize, 2 if plan.splits == 1 else 4)
    if not fits or plan.stages < 2 or plan.splits < 1 or need > gpu.shared:
        raise ValueError(
            f"blocks={chosen}: outputs must be 64, 128 or 256, rows a multiple of {STRIP}, 256 at most for each strip "
            f"of a warpgroup, stages 2 or more, splits 1; {need} bytes of shared memory, of {gpu.shared} at most"
        )
    # Every split has a step, or it would wait for one.
    return dataclasses.replace(plan, splits=pl.cdiv(plan.steps, pl.cdiv(plan.steps, min(plan.splits, plan.steps))))


def default_blocks(M: int, I: int, O: int, gpu: gpus.Gpu) -> dict[str, int]:
    """Return blocks that read least of the L2 cache; of few of them, more splits or fewer outputs each."""
    rows = 64 if M <= 64 else 128
    outputs = 256 if pl.cdiv(M, rows) * pl.cdiv(O, 256) >= gpu.processors // 2 else 128
    blocks = pl.cdiv(M, rows) * pl.cdiv(O, outputs)
    splits = max(1, min(gpu.processors // blocks, 4, I // 1024))
    return {"outputs": outputs, "rows": rows, "stages": 4, "splits": splits}
