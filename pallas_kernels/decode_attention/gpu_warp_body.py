"""The body of decode attention on Hopper over a quantized cache, for at most 8 query rows: see `gpu_warp`.

A block of the cache comes as in the body of floats; nothing else is shared, and warps meet once a block, before the
next copy overwrites what they read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_instructions, gpu_merge_warps, gpu_warp
from pallas_kernels.decode_attention.gpu_cluster import Parts
from pallas_kernels.decode_attention.gpu_lanes import Tile
from pallas_kernels.decode_attention.gpu_masks import NUMBER, Range
from pallas_kernels.decode_attention.gpu_operands import Halves, Integers
from pallas_kernels.decode_attention.gpu_plan import Plan, swizzle
from pallas_kernels.decode_attention.gpu_stream import Stream
from pallas_kernels.decode_attention.gpu_warp import LEAST, LOG2E


def tile_of(plan: Plan) -> Tile:
    """Return the sizes of a warp's work."""
    line = swizzle(plan.H, plan.stored)
    factor = plan.scale * LOG2E if plan.softcap is None else plan.scale / plan.softcap
    return Tile(
        slots=plan.slots // 4, line=line, lines=plan.H // line, rows=plan.rows, tokens=plan.tokens, factor=factor,
        softcap=plan.softcap, window=plan.window, sinks=plan.sinks, tree_words=plan.tree_words,
        operands=Integers if plan.stored == jnp.int8 else Halves,
    )  # fmt: skip


def body(plan: Plan, source: Any, refs: dict[str, Any], memory: dict[str, Any]) -> None:
    """Attend to a split's share of a row; `source` finds the blocks of keys and values, and starts to copy them."""
    if plan.overlap:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    tile = tile_of(plan)
    group, split = jax.lax.axis_index("rows"), jax.lax.axis_index("splits")
    b, head = jax.lax.div(group, jnp.int32(plan.kv_heads)), jax.lax.rem(group, jnp.int32(plan.kv_heads))
    at = Range(plan, refs, b)
    begin, end = at.share(split)
    stream = Stream(plan, source, refs, memory, at, b, head, begin, end)
    stream.fill()
    start, alive = at.alive()
    fixed = _prepare(tile, refs["q"].at[group], refs["tree"].at[b] if plan.tree_words else None, start, at)

    def step(item: Any, sums: Any) -> Any:
        stage, base = stream.stage(item), at.base_of(item)
        plgpu.barrier_wait(memory["k_barrier"].at[stage])
        found = _scores(tile, fixed, memory, stage, base, start)
        plgpu.barrier_wait(memory["v_barrier"].at[stage])
        sums = _mix(tile, sums, found, memory, stage, base, start, alive)
        stream.next(item, meet)
        return sums

    zeros = plgpu.layout_cast(jnp.zeros((128 * (tile.own + 2),), jnp.float32), _held(tile.own + 2))
    sums = jax.lax.fori_loop(begin, end, step, _begin(tile, zeros))
    where = (group, split) if plan.cluster is None else (group,)
    _finish(plan, tile, sums, memory, split, [refs[name].at[where] for name in ("out", "lse") if name in refs])


def _held(count: int) -> Any:
    """Return a layout that stands for some registers of each thread, whatever is in them."""
    return plgpu.Layout.WG_STRIDED((128 * count,), 1)


def _array(count: int) -> Any:
    return plgpu.ShapeDtypeStruct((128 * count,), jnp.float32, layout=_held(count))


def _tiles(tile: Tile) -> Any:
    """Return the type of a block of keys, or of values, in shared memory."""
    return plgpu.RefType((plgpu.TilingTransform((8, tile.line)), plgpu.SwizzleTransform(tile.line)))


def _floats(words: list[Any]) -> Any:
    return gpu_instructions.carried([gpu_instructions.as_float(word) for word in words])


def _words(array: Any) -> list[Any]:
    return [gpu_instructions.as_word(value) for value in gpu_instructions.uncarried(array)]


def _begin(tile: Tile, zeros: Any) -> Any:
    """Return the sums of a thread before it has seen anything."""

    @plgpu.inline_mgpu(arg_types=(_held(tile.own + 2),), return_type=_array(tile.own + 2))
    def run(_: Any, zeros: Any) -> Any:
        *acc, _, total = gpu_instructions.uncarried(zeros)
        return gpu_instructions.carried([*acc, gpu_instructions.real(LEAST), total])

    return run(zeros)


def _prepare(tile: Tile, q: Any, tree: Any, start: Any, at: Range) -> Any:
    trees = [] if tree is None else [tree]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), [plgpu.RefType() for _ in trees], NUMBER, NUMBER, NUMBER),
        return_type=_array(tile.fixed),
    )
    def run(_: Any, q: Any, trees: Any, *numbers: Any) -> Any:
        numbers = [number.registers.item() for number in numbers]
        return _floats(gpu_warp.prepare(tile, q, trees[0] if trees else None, *numbers))

    return run(q, trees, start, at.length, at.position)


def _scores(tile: Tile, fixed: Any, memory: dict[str, Any], stage: Any, base: Any, start: Any) -> Any:
    @plgpu.inline_mgpu(
        arg_types=(_held(tile.fixed), _tiles(tile), plgpu.RefType(), NUMBER, NUMBER), return_type=_array(tile.scores)
    )
    def run(_: Any, fixed: Any, keys: Any, scales: Any, base: Any, start: Any) -> Any:
        base, start = base.registers.item(), start.registers.item()
        return gpu_instructions.carried(gpu_warp.scores(tile, _words(fixed), keys, scales, base, start))

    return run(fixed, memory["k"].at[stage], memory["k_scale"].at[stage], base, start)


def _mix(
    tile: Tile, sums: Any, found: Any, memory: dict[str, Any], stage: Any, base: Any, start: Any, alive: Any
) -> Any:
    held = _held(tile.own + 2)

    @plgpu.inline_mgpu(
        arg_types=(held, _held(tile.scores), _tiles(tile), plgpu.RefType(), NUMBER, NUMBER, NUMBER),
        return_type=_array(tile.own + 2),
    )
    def run(_: Any, sums: Any, found: Any, values: Any, scales: Any, *numbers: Any) -> Any:
        base, *alive = [number.registers.item() for number in numbers]
        sums, found = gpu_instructions.uncarried(sums), gpu_instructions.uncarried(found)
        return gpu_instructions.carried(gpu_warp.mix(tile, sums, found, values, scales, base, alive))

    return run(sums, found, memory["v"].at[stage], memory["v_scale"].at[stage], base, start, alive)


def _finish(plan: Plan, tile: Tile, sums: Any, memory: dict[str, Any], split: Any, found: list[Any]) -> None:
    """Write the output, and perhaps the log-sum-exp, to what is `found`."""
    sent = [] if plan.cluster is None else [memory["parts"]]
    types = _held(tile.own + 2), _tiles(tile), _tiles(tile), [plgpu.RefType() for _ in sent], NUMBER

    @plgpu.inline_mgpu(arg_types=(*types, [plgpu.RefType() for _ in found]), return_type=())
    def run(_: Any, sums: Any, shared: Any, peaks: Any, sent: Any, block: Any, found: Any) -> Any:
        sums, (out, lse) = gpu_instructions.uncarried(sums), (*found, None)[:2]
        if plan.cluster is None:
            gpu_merge_warps.finish(tile, sums, shared, peaks, gpu_merge_warps.Output(tile, out, plan.letters, lse))
        else:
            parts = Parts(plan.cluster, sent[0], block.registers.item())
            gpu_merge_warps.finish(tile, sums, shared, peaks, parts)
            parts.merge(gpu_instructions.number(0), out, plan.letters, lse)
        return ()

    run(sums, memory["k"].at[0], memory["v"].at[0], sent, split, found)


def meet() -> None:
    """Wait for all threads of the block."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def run(_: Any) -> Any:
        gpu_instructions.meet()
        return ()

    run()
