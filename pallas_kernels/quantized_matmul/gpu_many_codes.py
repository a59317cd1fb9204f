"""How a warpgroup makes the left side of Hopper's matrix instruction of codes in shared memory, in its registers.

A thread has of each 16 inputs four, of rows r and r + 8 of its warp's 16 outputs, in two words each: `gpu_many.ordered`
says which inputs these are. A code is a float of x's dtype exactly; a scale of that dtype multiplies it there, rounded
once, and any other one in float32.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels.quantized_matmul import gpu_words as words
from pallas_kernels.quantized_matmul.gpu_codes import widened
from pallas_kernels.quantized_matmul.gpu_many_plan import LINE, PART, STRIP, Plan

EIGHT = 8 * LINE  # bytes of eight outputs


def taken(plan: Plan, weight: Any, grids: list[Any], group: Any, part: int) -> Any:
    """Return what a thread of a warpgroup holds of a part of a step: words of codes, then its scales and offsets."""
    plain, tiles = plgpu.RefType(), plgpu.RefType((plgpu.TilingTransform((8, LINE)), plgpu.SwizzleTransform(LINE)))
    count = plan.held

    @plgpu.inline_mgpu(
        arg_types=(tiles, [plain for _ in grids], plgpu.Layout.WG_SPLAT(())),
        return_type=plgpu.ShapeDtypeStruct((128 * count,), jnp.float32, layout=_carrier(count)),
    )
    def run(_: Any, weight: Any, grids: Any, group: Any) -> Any:
        held = words_of(plan, weight, grids, group.registers.item(), part)
        return words.carried([words.as_float(word) for word in held])

    return run(weight, grids, group)


def floats(plan: Plan, held: Any) -> Any:
    """Return a warpgroup's outputs `[strips * 64, 64]` of a part, as the matrix instruction takes them.

    To be made when no product is under way: the assembler lets none run on while the next one's registers are written.
    """
    shape, dtype = (plan.strips * STRIP, PART), {"bf16": "bfloat16", "f16": "float16"}[plan.letters]

    @plgpu.inline_mgpu(
        arg_types=(_carrier(plan.held),),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )
    def run(_: Any, held: Any) -> Any:
        pair = ir.VectorType.get((2,), ir.BF16Type.get() if plan.letters == "bf16" else ir.F16Type.get())
        registers = np.empty((plan.strips, PART // 8, 1, 1, 2, 1, 1, 1, 1), dtype=object)
        for (strip, eight, half), word in pairs(plan, [words.as_word(x) for x in words.uncarried(held)]).items():
            registers[strip, eight, 0, 0, half, 0, 0, 0, 0] = utils.bitcast(word, pair)
        return mgpu.FragmentedArray(_registers=registers, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)

    return run(held)


def _carrier(count: int) -> Any:
    return plgpu.Layout.WG_STRIDED((128 * count,), 1)  # stands for registers, whatever is in them


def words_of(plan: Plan, weight: Any, grids: list[Any], group: Any, part: int) -> list[Any]:
    """Return the words that `taken` has: of each strip and half of it the codes; then its scales, and its offsets."""
    index = words.thread()
    warp, row = words.right(index, 5), words.both(words.right(index, 2), 7)
    quarter = words.both(index, 3)
    chunk = words.times(words.differ(quarter, words.right(row, 1)), 16)
    base = words.add(words.add(words.times(warp, 2 * EIGHT), words.times(row, LINE)), chunk)
    base = words.onward(words.pointer(weight), base)
    halves = [(strip, half) for strip in range(plan.strips) for half in (0, 1)]
    found = []
    for strip, half in halves:
        at = (strip * 8 + half) * EIGHT + 4 * plan.words * part
        found += words.several(words.onward(base, at), plan.words)
    mine = words.add(words.times(group, plan.strips * STRIP), words.add(words.times(warp, 16), row))
    # The thread's inputs lie together, and are of one group.
    ahead = words.times(words.quotient(words.times(quarter, 16 * plan.planes), plan.group), plan.outputs)
    for grid in grids:
        size = words.width(grid)
        here = words.onward(words.pointer(grid), words.times(words.add(ahead, mine), size))
        for strip, half in halves:
            found.append(words.as_word(words.read(words.onward(here, (strip * STRIP + half * 8) * size), size)))
    return found


def pairs(plan: Plan, held: list[Any]) -> dict[tuple[int, int, int], Any]:
    """Return a thread's words of two floats, by strip, eight inputs, and whether they are the lower outputs'."""
    halves = [(strip, half) for strip in range(plan.strips) for half in (0, 1)]
    grids = held[len(halves) * plan.words :]
    found = {}
    for n, (strip, half) in enumerate(halves):
        grid = [words.as_float(word) for word in grids[n :: len(halves)]]
        if plan.exact:
            grid = [words.pair(plan.letters, value, value) for value in grid]
        for i, codes in enumerate(held[n * plan.words : (n + 1) * plan.words]):
            for plane, two in enumerate(widened(plan, codes)):
                for c, value in enumerate(two):
                    place = strip, 2 * (i * plan.planes + plane) + c, half
                    found[place] = _scaled(plan, value, grid) if grid else value
    return found


def _scaled(plan: Plan, codes: Any, grid: list[Any]) -> Any:
    """Return two codes times the scale, plus the offset if there is one, in x's dtype."""
    if not plan.exact:
        scale, offset = (*grid, words.real(0.0))[:2]
        return words.pair(plan.letters, *[words.fma(x, scale, offset) for x in words.unpaired(plan.letters, codes)])
    if len(grid) == 1:
        return words.pairwise("mul", plan.letters, codes, grid[0])
    return words.pair_fma(plan.letters, codes, *grid)
