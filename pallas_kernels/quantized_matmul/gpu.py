"""Quantized product on a Hopper GPU: the weight streams once through shared memory, and becomes floats in registers.

The weight is the left side of the matrix instructions and x, of few rows, the right one: y^T = W x^T. Each block has
some outputs, and some of the inputs where there are too few outputs for every processor; a ring of stages keeps the
copies ahead of it. A group's sum is kept apart and scaled in float32. See `gpu_registers` for the work of a thread.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import calls, gpus
from pallas_kernels.quantized_matmul import gpu_registers, gpu_sums, gpu_words
from pallas_kernels.quantized_matmul.gpu_plan import Plan, check, plan_for
from pallas_kernels.quantized_matmul.gpu_tile import BANKS, LINE, Lane, Tile


def quantized_matmul(
    x: Float[Array, "M I"],
    values: Array,
    scale: Float[Array, "G O"],
    *,
    qtype: str,
    offset: Float[Array, "G O"] | None = None,
    activations: str | None = None,
    blocks: dict[str, int] | None = None,
    interpret: calls.Interpret = False,
) -> Float[Array, "M O"]:
    """Return what the contract of this folder says, of 64 rows at most; x is bfloat16 or float16.

    `blocks`: outputs a block, lines of 128 bytes of each a step (1, 2 or 4), `deep`: the warps of the four that share
    outputs (1, 2 or 4), stages of the ring, and splits of the inputs over blocks, whose sums XLA adds up, or they do as
    a cluster of up to 8 (`cluster` 1); by default what fills the GPU.

    Raises:
        NotImplementedError: a qtype, dtype, number of rows, or groups, that the kernel does not know.
        ValueError: shapes that do not fit.
    """
    if interpret:
        raise NotImplementedError("interpret: the kernel is written in the GPU's instructions")
    M, O = x.shape[0], values.shape[0]
    check(x, values, scale, offset, qtype, activations)
    plan = plan_for(x, values, scale, qtype, offset is not None, activations, blocks, gpus.current())
    tile = plan.tile
    x, scales = prepared(tile, x, scale, offset)
    out = jax.ShapeDtypeStruct((plan.parts, M, O), x.dtype if plan.parts == 1 else jnp.float32)
    parts = _call(plan, x, values, scales, out)
    return parts.reshape(M, O) if plan.parts == 1 else parts.sum(axis=0).astype(x.dtype)


def _call(plan: Plan, x: Array, values: Array, scales: dict[str, Array], out: Any) -> Array:
    """Return the sums of each split `[splits, M, O]`, scaled."""
    tile = plan.tile
    names = list(scales)
    widths = {"scale": tile.outputs, "offset": tile.outputs, "step": tile.row_of_steps}
    slots = 1 if tile.whole else plan.stages
    swizzle = plgpu.SwizzleTransform(LINE)
    tiling = plgpu.TilingTransform((tile.rows, LINE // 2))
    copies = tile.lines + 1 + (0 if tile.whole else len(scales))
    scratch = {
        "weight": plgpu.SMEM((plan.stages, tile.lines, tile.outputs, LINE), values.dtype, transforms=(swizzle,)),
        "x": plgpu.SMEM((plan.stages, tile.rows, tile.inputs), x.dtype, transforms=(tiling, swizzle)),
        "kept": {n: plgpu.SMEM((slots, tile.groups, widths[n]), scales[n].dtype) for n in names},
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
        "ready": plgpu.Barrier(num_arrivals=len(scales)),
    }

    def body(x_ref, values_ref, *refs, weight, x, kept, full, ready):
        *scale_refs, out_ref = refs
        block, split = jax.lax.axis_index("block"), jax.lax.axis_index("split")
        first = split * plan.each
        count = jnp.minimum(plan.each, plan.steps - first)
        start = block * tile.outputs
        top = jnp.int32(0) * block  # past the end of x the copies bring zeros: known bounds would be refused

        def copy(step):
            slot = jax.lax.rem(step, plan.stages)
            at = first + step
            for line in range(tile.lines):
                plgpu.copy_gmem_to_smem(
                    values_ref.at[pl.ds(start, tile.outputs), pl.ds((at * tile.lines + line) * LINE, LINE)],
                    weight.at[slot, line],
                    full.at[slot],
                )
            inputs = pl.ds(at * tile.inputs, tile.inputs)
            plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(top, tile.rows), inputs], x.at[slot], full.at[slot])
            if not tile.whole:
                copy_scales(jax.lax.div(at * (tile.lines * BANKS), tile.group), slot, full.at[slot])

        def copy_scales(group, slot, barrier):
            for name, ref in zip(names, scale_refs, strict=True):
                columns = pl.ds(top if name == "step" else start, widths[name])
                plgpu.copy_gmem_to_smem(ref.at[pl.ds(group, tile.groups), columns], kept[name].at[slot], barrier)

        def begin(step, _):
            copy(step)

        jax.lax.fori_loop(0, jnp.minimum(plan.stages, count), begin, None)
        if tile.whole:
            copy_scales(top, 0, ready)

        def advance(step, sums):
            slot = jax.lax.rem(step, plan.stages)
            plgpu.barrier_wait(full.at[slot])
            here = {name: kept[name].at[0 if tile.whole else slot] for name in names}
            sums = _multiply(tile, sums, weight.at[slot], x.at[slot], here)

            @pl.when(step + plan.stages < count)
            def _():
                _meet()  # everyone has read the slot
                copy(step + plan.stages)

            return sums

        zeros = plgpu.layout_cast(jnp.zeros((128 * tile.carried,), jnp.float32), _layout(tile.carried))
        sums = jax.lax.fori_loop(0, count, advance, zeros)
        if tile.whole:
            plgpu.barrier_wait(ready)
        if plan.left:
            _meet()  # everyone has read the ring, where the sums are now left
        here = {name: kept[name].at[0] for name in names}
        _finish(plan, sums, out_ref, here, weight, split, start, out)

    blocks = (pl.cdiv(values.shape[0], tile.outputs),)
    if plan.cluster:
        shape = {"grid": blocks, "grid_names": ("block",), "cluster": (plan.splits,), "cluster_names": ("split",)}
    else:
        shape = {"grid": (*blocks, plan.splits), "grid_names": ("block", "split")}
    run = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        **shape,
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name="quantized_matmul",
    )
    return run(x, values, *scales.values())


def _layout(registers: int) -> Any:
    """Return a layout that stands for some registers of each thread, whatever is in them."""
    return plgpu.Layout.WG_STRIDED((128 * registers,), 1)


def _multiply(tile, sums, weight, x, scales):
    """Return the sums with those of a step's products added."""
    swizzle = plgpu.SwizzleTransform(LINE)
    tiling = plgpu.TilingTransform((tile.rows, LINE // 2))
    layout = _layout(tile.carried)

    @plgpu.inline_mgpu(
        arg_types=(
            layout, plgpu.RefType((swizzle,)), plgpu.RefType((tiling, swizzle)), {n: plgpu.RefType() for n in scales},
        ),
        return_type=plgpu.ShapeDtypeStruct((128 * tile.carried,), jnp.float32, layout=layout),
    )  # fmt: skip
    def run(ctx, sums, weight, x, scales):
        del ctx
        return gpu_words.carried(gpu_registers.multiply(tile, gpu_words.uncarried(sums), weight, x, scales))

    return run(sums, weight, x, scales)


def _finish(plan, sums, out_ref, scales, left, split, output, out):
    """Write the sums where they belong, scaled if there is one group; of warps that share outputs, added up."""
    tile = plan.tile
    number = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
        arg_types=(
            _layout(tile.carried), plgpu.RefType(), {n: plgpu.RefType() for n in scales},
            plgpu.RefType((plgpu.SwizzleTransform(LINE),)), number, number,
        ),
        return_type=(),
    )  # fmt: skip
    def run(ctx, sums, out_ref, scales, left, split, output):
        del ctx
        sums = gpu_words.uncarried(sums)
        split, output = split.registers.item(), output.registers.item()
        if tile.whole:
            zeros = [gpu_words.real(0.0)] * tile.sums
            sums = gpu_sums.scaled(tile, Lane(tile), zeros, sums, scales, 0)
        shape = out.shape[1:]
        row = gpu_words.number(0) if plan.cluster else gpu_words.times(split, shape[0])
        if not plan.left:
            gpu_sums.store(tile, sums, out_ref, row, output, shape)
            return ()
        gpu_sums.leave(tile, sums, left)
        if plan.cluster:
            gpu_words.meet(seen=True)
        else:
            mgpu.warpgroup_barrier()
        gpu_sums.gather(tile, plan.splits if plan.cluster else 1, split, left, out_ref, row, output, shape)
        if plan.cluster:
            gpu_words.meet(seen=False)  # the others have read what this block left: it may end
        return ()

    run(sums, out_ref, scales, left, split, output)


def _meet():
    """Wait for all threads of the block."""

    @plgpu.inline_mgpu(arg_types=(), return_type=())
    def run(ctx):
        del ctx
        mgpu.warpgroup_barrier()
        return ()

    run()


def prepared(tile: Tile, x: Array, scale: Array, offset: Array | None) -> tuple[Array, dict[str, Array]]:
    """Return x and its scales, by name, as the copies can read them."""
    M, I = x.shape
    scales = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    scales = {name: _wide(array) for name, array in scales.items()}
    if tile.rounded:
        x, step = _rounded(x, scale.shape[0])
        scales["step"] = jnp.pad(step, ((0, 0), (0, tile.row_of_steps - M)))
    return (jnp.pad(x, ((0, 0), (0, -I % 64))) if I % 64 else x), scales


def _rounded(x: Array, groups: int) -> tuple[Array, Array]:
    """Return x as integers of a step, and the step `[G, M]` of each group."""
    parts = x.astype(jnp.float32).reshape(x.shape[0], groups, -1)
    peak = jnp.abs(parts).max(axis=-1)
    step = jnp.where(peak > 0, peak / 127.0, 1.0)
    return jnp.round(parts / step[..., None]).astype(x.dtype).reshape(x.shape), step.T


def _wide(scale: Array) -> Array:
    """Return scales whose rows the copies can find: rows of whole 16 bytes."""
    short = -scale.shape[1] % (16 // scale.dtype.itemsize)
    return jnp.pad(scale, ((0, 0), (0, short))) if short else scale
