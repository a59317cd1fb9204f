"""Quantized product on a Hopper GPU: the weight streams once through shared memory, and becomes floats in registers.

The weight is the left side of the matrix instructions and x, of few rows, the right one: y^T = W x^T. Each block has
some outputs, and some of the inputs where there are too few outputs for every processor; a ring of stages keeps the
copies ahead of it. A group's sum is kept apart and scaled in float32. See `gpu_registers` for the work of a thread.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import calls, gpus, tuning
from pallas_kernels.quantized_matmul import gpu_copies, gpu_many, gpu_many_plan, gpu_registers, gpu_sums, gpu_words
from pallas_kernels.quantized_matmul.gpu_plan import MOST_ROWS, Plan, block_class, check, plan_for
from pallas_kernels.quantized_matmul.gpu_tile import LINE, Lane, Tile


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
    """Return what the contract of this folder says; x is bfloat16 or float16.

    `blocks`: outputs a block (0: as many as divide them evenly over the processors), lines of 128 bytes of each a step
    (1, 2 or 4), `deep`: the warps of the four that share outputs (1, 2 or 4), stages of the ring, and splits of the
    inputs over blocks, whose sums XLA adds up, or they do as a cluster of up to 8 (`cluster` 1); by default what fills
    the GPU. More than 64 rows, and blocks with `rows`, are another kernel's: see `gpu_many_plan.plan_for`.

    Raises:
        NotImplementedError: a qtype, dtype, number of rows, or groups, that the kernel does not know.
        ValueError: shapes that do not fit.
    """
    if interpret:
        raise NotImplementedError("interpret: the kernel is written in the GPU's instructions")
    M, O = x.shape[0], values.shape[0]
    check(x, values, scale, offset, qtype, activations)
    many = _of_many(x, values, scale, qtype, offset, activations, blocks)
    if many is not None:
        return gpu_many.multiply(many, x, values, scale, offset)
    plan = plan_for(x, values, scale, qtype, offset is not None, activations, blocks, gpus.current())
    tile = plan.tile
    x, scales = prepared(tile, x, scale, offset)
    out = jax.ShapeDtypeStruct((plan.parts, M, O), x.dtype if plan.parts == 1 else jnp.float32)
    parts = _call(plan, x, values, scales, out)
    return parts.reshape(M, O) if plan.parts == 1 else parts.sum(axis=0).astype(x.dtype)


def _of_many(
    x: Any, values: Any, scale: Any, qtype: str, offset: Any, activations: str | None, blocks: dict[str, int] | None
) -> gpu_many_plan.Plan | None:
    """Return the plan of the kernel of many rows, or None: there are few, and no `rows` of a block are asked for."""
    cut = functools.partial(gpu_many_plan.plan_for, x, values, scale, qtype, offset, gpu=gpus.current())
    shape = block_class(x, values, scale, qtype=qtype, activations=activations)
    given = blocks or tuning.gpu_blocks("quantized_matmul", gpus.current().name, shape)
    if x.shape[0] <= MOST_ROWS and "rows" not in given:
        return None
    try:
        return cut(given)
    except (NotImplementedError, ValueError):
        if blocks or not given:
            raise
    return cut({}) if x.shape[0] > MOST_ROWS else None  # measured for a near shape, they do not fit here


def _call(plan: Plan, x: Array, values: Array, scales: dict[str, Array], out: Any) -> Array:
    """Return the sums of each split `[splits, M, O]`, scaled."""
    tile = plan.tile
    names = list(scales)
    widths = {name: tile.row_of_steps if name == "step" else tile.outputs for name in names}
    slots = 1 if tile.whole else plan.stages
    swizzle = plgpu.SwizzleTransform(LINE)
    tiling = plgpu.TilingTransform((tile.rows, LINE // 2))
    scratch = {
        "weight": plgpu.SMEM((plan.stages, tile.lines, tile.outputs, LINE), values.dtype, transforms=(swizzle,)),
        "rows": plgpu.SMEM((plan.stages, tile.rows, tile.inputs), x.dtype, transforms=(tiling, swizzle)),
        "kept": {n: plgpu.SMEM((slots, tile.groups, widths[n]), scales[n].dtype) for n in names},
        "full": plgpu.SMEM((2 * (plan.stages + 1),), jnp.int32),  # barriers, of 8 bytes
    }
    plain, number = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
    types = {
        "x": plain, "values": plain, "scales": dict.fromkeys(names, plain), "kept": dict.fromkeys(names, plain),
        "weight": plgpu.RefType((swizzle,)), "rows": plgpu.RefType((tiling, swizzle)), "full": plain,
    }  # fmt: skip
    layout = plgpu.Layout.WG_STRIDED((128 * tile.carried,), 1)  # stands for registers, whatever is in them
    carried = plgpu.ShapeDtypeStruct((128 * tile.carried,), jnp.float32, layout=layout)

    @plgpu.inline_mgpu(arg_types=(types, number, number, number), return_type=())
    def begin(ctx, refs, *where):
        gpu_copies.begin(ctx, plan, refs, *(w.registers.item() for w in where))
        return ()

    @plgpu.inline_mgpu(arg_types=(layout, types, number, number, number, number), return_type=carried)
    def advance(ctx, sums, refs, step, *where):
        step = step.registers.item()
        slot = gpu_copies.arrived(plan, refs, step)
        weight, rows = (gpu_copies.part(refs[name], slot) for name in ("weight", "rows"))
        kept = {} if tile.whole else {name: gpu_copies.part(ref, slot) for name, ref in refs["kept"].items()}
        sums = gpu_registers.multiply(tile, gpu_words.uncarried(sums), weight, rows, kept)
        gpu_copies.refill(ctx, plan, refs, step, *(w.registers.item() for w in where))
        return gpu_words.carried(sums)

    @plgpu.inline_mgpu(arg_types=(layout, types, plain, number, number), return_type=())
    def finish(ctx, sums, refs, out_ref, split, start):
        del ctx
        where = out_ref, split.registers.item(), start.registers.item(), out.shape[1:]
        _finish(plan, gpu_words.uncarried(sums), refs, *where)
        return ()

    def body(x_ref, values_ref, *refs, **scratch):
        *scale_refs, out_ref = refs
        split = jax.lax.axis_index("split")
        start = jax.lax.axis_index("block") * tile.outputs
        first = split * plan.each
        where = first, start, jnp.minimum(plan.each, plan.steps - first)
        refs = {"x": x_ref, "values": values_ref, "scales": dict(zip(names, scale_refs, strict=True))} | scratch
        begin(refs, *where)
        zeros = plgpu.layout_cast(jnp.zeros((128 * tile.carried,), jnp.float32), layout)
        sums = jax.lax.fori_loop(0, where[2], lambda step, sums: advance(sums, refs, step, *where), zeros)
        finish(sums, refs, out_ref, split, start)

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


def _finish(plan, sums, refs, out_ref, split, output, shape):
    """Write the sums where they belong, scaled if there is one group; of warps that share outputs, added up."""
    tile = plan.tile
    if tile.whole:
        gpu_copies.scales_arrived(plan, refs)
        zeros = [gpu_words.real(0.0)] * tile.sums
        kept = {name: gpu_copies.part(ref, gpu_words.number(0)) for name, ref in refs["kept"].items()}
        sums = gpu_sums.scaled(tile, Lane(tile), zeros, sums, kept, 0)
    row = gpu_words.number(0) if plan.cluster else gpu_words.times(split, shape[0])
    if not plan.left:
        gpu_sums.store(tile, sums, out_ref, row, output, shape)
        return
    left = refs["weight"]
    mgpu.warpgroup_barrier()  # everyone has read the ring
    gpu_sums.leave(tile, sums, left)
    if plan.cluster:
        gpu_words.meet(seen=True)
    else:
        mgpu.warpgroup_barrier()
    gpu_sums.gather(tile, plan.splits if plan.cluster else 1, split, left, out_ref, row, output, shape)
    if plan.cluster:
        gpu_words.meet(seen=False)  # the others have read what this block left: it may end


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
