"""The body of decode attention on Hopper whose warps attend each for itself, to 8 query rows: see `gpu_warp`.

A block of the cache comes as in the body of floats; nothing else is shared, and warps meet once a block, before the
next copy overwrites what they read. What a thread does with the codes is its module's business, the `threads` of the
source: `tile_of`, `prepare`, `scores`, `mix` and `finish`, and what comes `BESIDE` the codes.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention import gpu_instructions
from pallas_kernels.decode_attention.gpu_cluster import Parts
from pallas_kernels.decode_attention.gpu_lanes import LEAST, Tile
from pallas_kernels.decode_attention.gpu_masks import NUMBER, Range
from pallas_kernels.decode_attention.gpu_merge_warps import Output
from pallas_kernels.decode_attention.gpu_plan import Plan
from pallas_kernels.decode_attention.gpu_stream import Stream


def body(plan: Plan, source: Any, refs: dict[str, Any], memory: dict[str, Any]) -> None:
    """Attend to a split's share of a row; `source` finds the blocks of keys and values, and starts to copy them."""
    if plan.overlap:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    group, split = jax.lax.axis_index("rows"), jax.lax.axis_index("splits")
    first, rows = jnp.int32(0), ()
    if plan.tiles > 1:
        group, first = jax.lax.div(group, jnp.int32(plan.tiles)), jax.lax.rem(group, jnp.int32(plan.tiles))
        first = first * plan.columns
        rows = (pl.ds(first, plan.columns),)
    b, head = jax.lax.div(group, jnp.int32(plan.kv_heads)), jax.lax.rem(group, jnp.int32(plan.kv_heads))
    at = Range(plan, refs, b)
    begin, end = at.share(split)
    stream = Stream(plan, source, refs, memory, at, b, head, begin, end)
    stream.fill()
    start, alive = at.alive()
    warps = _Warps(plan, source.threads, memory)
    tree = refs["tree"].at[b] if plan.tree_words else None
    fixed = warps.prepare(refs["q"].at[(group, *rows)], tree, start, at, first)

    def step(item: Any, sums: Any) -> Any:
        stage, base = stream.stage(item), at.base_of(item)
        plgpu.barrier_wait(memory["k_barrier"].at[stage])
        found = warps.scores(fixed, stage, base, start)
        plgpu.barrier_wait(memory["v_barrier"].at[stage])
        sums = warps.mix(sums, found, stage, base, start, alive)
        stream.next(item, meet)
        return sums

    sums = jax.lax.fori_loop(begin, end, step, warps.begin())
    where = (group, split, *rows) if plan.cluster is None else (group,)
    warps.finish(sums, split, first, [refs[name].at[where] for name in ("out", "lse") if name in refs])


def _held(count: int) -> Any:
    """Return a layout that stands for some registers of each thread, whatever is in them."""
    return plgpu.Layout.WG_STRIDED((128 * count,), 1)


def _array(count: int) -> Any:
    return plgpu.ShapeDtypeStruct((128 * count,), jnp.float32, layout=_held(count))


def _floats(words: list[Any]) -> Any:
    return gpu_instructions.carried([gpu_instructions.as_float(word) for word in words])


def _words(array: Any) -> list[Any]:
    return [gpu_instructions.as_word(value) for value in gpu_instructions.uncarried(array)]


class _Warps:
    """What the threads' module does, of refs and arrays."""

    def __init__(self, plan: Plan, threads: Any, memory: dict[str, Any]):
        self._plan, self._threads, self._memory = plan, threads, memory
        self._tile: Tile = threads.tile_of(plan)
        line = self._tile.line
        self._codes = plgpu.RefType((plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(line)))
        self._blocks = (self._codes, [plgpu.RefType() for _ in threads.BESIDE])

    def _block(self, name: str, stage: Any) -> tuple[Any, list[Any]]:
        """Return the codes of keys, or of values, at a stage, and what comes beside them."""
        codes, *beside = (self._memory[x].at[stage] for x in (name, *(f"{name}_{y}" for y in self._threads.BESIDE)))
        return codes, beside

    def begin(self) -> Any:
        """Return the sums of a thread before it has seen anything."""
        count = self._tile.sums
        zeros = plgpu.layout_cast(jnp.zeros((128 * count,), jnp.float32), _held(count))

        @plgpu.inline_mgpu(arg_types=(_held(count),), return_type=_array(count))
        def run(_: Any, zeros: Any) -> Any:
            *rest, _, total = gpu_instructions.uncarried(zeros)
            return gpu_instructions.carried([*rest, gpu_instructions.real(LEAST), total])

        return run(zeros)

    def prepare(self, q: Any, tree: Any, start: Any, at: Range, first: Any) -> Any:
        """Return the words of a thread that stay."""
        trees = [] if tree is None else [tree]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), [plgpu.RefType() for _ in trees], NUMBER, NUMBER, NUMBER, NUMBER),
            return_type=_array(self._tile.fixed),
        )
        def run(_: Any, q: Any, trees: Any, *numbers: Any) -> Any:
            numbers = [number.registers.item() for number in numbers]
            return _floats(self._threads.prepare(self._tile, q, trees[0] if trees else None, *numbers))

        return run(q, trees, start, at.length, at.position, first)

    def scores(self, fixed: Any, stage: Any, base: Any, start: Any) -> Any:
        """Return the scores of a block."""

        @plgpu.inline_mgpu(
            arg_types=(_held(self._tile.fixed), *self._blocks, NUMBER, NUMBER), return_type=_array(self._tile.scores)
        )
        def run(_: Any, fixed: Any, keys: Any, beside: Any, base: Any, start: Any) -> Any:
            base, start = base.registers.item(), start.registers.item()
            return gpu_instructions.carried(self._threads.scores(self._tile, _words(fixed), keys, *beside, base, start))

        return run(fixed, *self._block("k", stage), base, start)

    def mix(self, sums: Any, found: Any, stage: Any, base: Any, start: Any, alive: Any) -> Any:
        """Return the sums with a block, of which the scores were `found`."""
        held = _held(self._tile.sums)

        @plgpu.inline_mgpu(
            arg_types=(held, _held(self._tile.scores), *self._blocks, NUMBER, NUMBER, NUMBER),
            return_type=_array(self._tile.sums),
        )
        def run(_: Any, sums: Any, found: Any, values: Any, beside: Any, *numbers: Any) -> Any:
            base, *alive = [number.registers.item() for number in numbers]
            sums, found = gpu_instructions.uncarried(sums), gpu_instructions.uncarried(found)
            return gpu_instructions.carried(self._threads.mix(self._tile, sums, found, values, *beside, base, alive))

        return run(sums, found, *self._block("v", stage), base, start, alive)

    def finish(self, sums: Any, split: Any, first: Any, found: list[Any]) -> None:
        """Write the output, and perhaps the log-sum-exp, to what is `found`."""
        plan, tile, finish = self._plan, self._tile, self._threads.finish
        sent = [] if plan.cluster is None else [self._memory["parts"]]
        types = _held(tile.sums), self._codes, self._codes, [plgpu.RefType() for _ in sent], NUMBER, NUMBER

        @plgpu.inline_mgpu(arg_types=(*types, [plgpu.RefType() for _ in found]), return_type=())
        def run(_: Any, sums: Any, shared: Any, peaks: Any, sent: Any, block: Any, first: Any, found: Any) -> Any:
            sums, (out, lse) = gpu_instructions.uncarried(sums), (*found, None)[:2]
            if plan.cluster is None:
                finish(tile, sums, shared, peaks, Output(tile, out, plan.letters, lse))
            else:
                parts = Parts(plan.cluster, sent[0], block.registers.item())
                finish(tile, sums, shared, peaks, parts)
                parts.merge(first.registers.item(), out, plan.letters, lse)
            return ()

        run(sums, self._memory["k"].at[0], self._memory["v"].at[0], sent, split, first, found)


def meet() -> None:
    """Wait for all threads of the block."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def run(_: Any) -> Any:
        gpu_instructions.meet()
        return ()

    run()
