"""Quantized product of many rows on a Hopper GPU: one warpgroup copies, others make the weight floats and multiply.

As that of few rows it is y^T = W x^T, with the weight in registers. While one warpgroup has the matrix unit another
makes floats of its next codes, which were read while its own products were under way. Which input of x meets which is
agreed on before: x's inputs are put in an order in which a thread finds its codes in 16 bytes that lie together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import compat
from pallas_kernels.calls import round_up
from pallas_kernels.quantized_matmul import gpu_many_codes
from pallas_kernels.quantized_matmul.gpu_many_plan import LINE, PART, STRIP, Plan

REGISTERS = {1: (240, 40), 2: (232, 40)}  # a thread, where there are so many warpgroups that multiply
TILE = 8  # rows of a tile in shared memory
MATRIX = plgpu.Layout.WGMMA


def multiply(
    plan: Plan, x: Float[Array, "M I"], values: Array, scale: Float[Array, "G O"], offset: Float[Array, "G O"] | None
) -> Float[Array, "M O"]:
    """Return the product, in x's dtype."""
    grids = {"scale": scale} if offset is None else {"scale": scale, "offset": offset}
    grids = {name: _whole_blocks(plan, grid) for name, grid in grids.items()}
    inputs = {"x": _padded(ordered(plan, x)), "values": values} | grids
    out = jax.ShapeDtypeStruct(
        (plan.splits, inputs["x"].shape[0], plan.O), x.dtype if plan.splits == 1 else jnp.float32
    )
    memory = scratch(plan, values.dtype, x.dtype, grids, out.dtype)
    rows, outputs = plan.tiles
    (found,) = compat.gpu_kernel(
        functools.partial(body, names=[*inputs, "out"], plan=plan, memory=memory),
        name="quantized_matmul_many",
        out_type=(out,),
        grid=(rows * outputs, plan.splits),
        grid_names=("tile", "split"),
        num_threads=plan.groups + 1,
        thread_name="group",
    )(*inputs.values())
    found = found[0] if plan.splits == 1 else found.sum(axis=0).astype(x.dtype)
    return found[: plan.M]


def ordered(plan: Plan, x: Float[Array, "M I"]) -> Float[Array, "M I"]:
    """Return x with the inputs of each step in the order in which the matrix instruction meets them.

    Of a step's 16 inputs thread t of four has 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: of its 16 bytes here four in a row.
    """
    if plan.planes == 2:
        parts = x.reshape(len(x), -1, 4, 2, 4, 2, 2)  # thread, plane, word, two of its bytes, byte
        return parts.transpose(0, 1, 4, 3, 5, 2, 6).reshape(x.shape)
    parts = x.reshape(len(x), -1, 4, 4, 2, 2)  # thread, word, byte of a half, which of two
    return parts.transpose(0, 1, 3, 5, 2, 4).reshape(x.shape)


def _padded(x: Array) -> Array:
    short = round_up(x.shape[0], TILE) - x.shape[0]
    return jnp.pad(x, ((0, short), (0, 0))) if short else x


def _whole_blocks(plan: Plan, grid: Array) -> Array:
    """Return scales of whole blocks of outputs: those of the sums are not copied, but read."""
    short = round_up(plan.O, plan.outputs) - plan.O if plan.whole else 0
    return jnp.pad(grid, ((0, 0), (0, short))) if short else grid


def scratch(plan: Plan, stored: Any, dtype: Any, grids: dict[str, Array], out_dtype: Any) -> dict[str, Any]:
    """Return what a block has in shared memory."""

    def tiles(line: int, size: int) -> dict[str, Any]:
        return {"transforms": (plgpu.TilingTransform((TILE, line // size)), plgpu.SwizzleTransform(line))}

    kept = {} if plan.whole else grids
    size = jnp.dtype(out_dtype).itemsize
    found = {
        "weight": plgpu.SMEM((plan.stages, plan.outputs, LINE), stored, **tiles(LINE, 1)),
        "rows": plgpu.SMEM((plan.stages, plan.rows, plan.inputs), dtype, **tiles(128, 2)),
        "out": plgpu.SMEM((plan.groups, STRIP, STRIP), out_dtype, **tiles(128, size)),
        "ready": plgpu.Barrier(num_arrivals=2 + len(kept), num_barriers=plan.stages),
        "free": plgpu.Barrier(num_arrivals=plan.groups, num_barriers=plan.stages),
    }
    for name, grid in kept.items():
        found[f"kept_{name}"] = plgpu.SMEM((plan.stages, plan.scales, plan.outputs), grid.dtype)
    return found


def body(*arrays: Any, names: list[str], plan: Plan, memory: dict[str, Any]) -> None:
    """Multiply a block: some warpgroups strips of it each, while the last one copies."""
    refs = dict(zip(names, arrays, strict=True))
    group, split = lax.axis_index("group"), lax.axis_index("split")
    rows, outputs = plan.at(lax.axis_index("tile"))
    begin = split * plan.each
    count = jnp.minimum(plan.each, plan.steps - begin) if plan.steps % plan.each else jnp.int32(plan.each)
    where = rows * plan.rows, outputs * plan.outputs
    registers = REGISTERS[plan.groups]

    def scoped(**held: Any) -> None:
        @pl.when(group < plan.groups)
        def _():
            plgpu.set_max_registers(registers[0], action="increase")
            acc = _sums(plan, held, group, count)
            _write(plan, refs, held, acc, group, split, *where)

        @pl.when(group == plan.groups)
        def _():
            plgpu.set_max_registers(registers[1], action="decrease")
            lax.fori_loop(0, count, lambda i, _: _copy(plan, refs, held, i, begin + i, *where), ())

    pl.run_scoped(scoped, **memory, collective_axes="group")


def _copy(plan: Plan, refs: dict[str, Any], held: dict[str, Any], i: Any, step: Any, row: Any, output: Any) -> tuple:
    """Start to copy a step, the block's i-th, once what was there is done with."""
    stage = lax.rem(i, jnp.int32(plan.stages))

    @pl.when(i >= plan.stages)
    def _():
        plgpu.barrier_wait(held["free"].at[stage])

    ready, outputs = held["ready"].at[stage], pl.ds(output, plan.outputs)
    inputs = pl.ds(step * plan.inputs, plan.inputs)
    plgpu.copy_gmem_to_smem(refs["values"].at[outputs, pl.ds(step * LINE, LINE)], held["weight"].at[stage], ready)
    plgpu.copy_gmem_to_smem(refs["x"].at[pl.ds(row, plan.rows), inputs], held["rows"].at[stage], ready)
    for name in ("scale", "offset"):
        if f"kept_{name}" in held:
            first = lax.div(step * plan.inputs, jnp.int32(plan.group))
            grids = refs[name].at[pl.ds(first, plan.scales), outputs]
            plgpu.copy_gmem_to_smem(grids, held[f"kept_{name}"].at[stage], ready)
    return ()


def _sums(plan: Plan, held: dict[str, Any], group: Any, count: Any) -> Any:
    """Return a warpgroup's sums `[strips * 64, rows]`."""
    outputs = plan.strips * STRIP
    own = pl.ds(group * outputs, outputs)

    def taken(stage: Any, part: int) -> Any:
        grids = [held[name].at[stage] for name in ("kept_scale", "kept_offset") if name in held]
        return gpu_many_codes.taken(plan, held["weight"].at[stage, own], grids, group, part)

    def product(acc: Any, codes: Any, stage: Any, part: int, later: Any) -> tuple[Any, Any]:
        """Return the sums with a part's products, and the `later` codes, which are read meanwhile."""
        weight = gpu_many_codes.floats(plan, codes)

        def both(refs: Any) -> None:
            acc_ref, later_ref = refs
            inputs = held["rows"].at[stage, pl.ds(0, plan.rows), pl.ds(part * PART, PART)]
            plgpu.wgmma(acc_ref, weight, compat.transposed(inputs))
            if later is not None:
                later_ref[...] = later()

        return pl.run_state(both)((plgpu.ACC.init(acc), codes))

    def step(i: Any, carry: tuple[Any, Any], last: bool = False) -> tuple[Any, Any]:
        acc, codes = carry
        stage, following = (lax.rem(x, jnp.int32(plan.stages)) for x in (i, i + 1))

        def of_next() -> Any:
            plgpu.barrier_wait(held["ready"].at[following])
            return taken(following, 0)

        for part in range(plan.planes - 1):
            acc, codes = product(acc, codes, stage, part, functools.partial(taken, stage, part + 1))
        acc, codes = product(acc, codes, stage, plan.planes - 1, None if last else of_next)
        plgpu.barrier_arrive(held["free"].at[stage])
        return acc, codes

    plgpu.barrier_wait(held["ready"].at[0])
    acc = plgpu.layout_cast(jnp.zeros((outputs, plan.rows), jnp.float32), MATRIX)
    carry = lax.fori_loop(0, count - 1, step, (acc, taken(jnp.int32(0), 0)))
    return step(count - 1, carry, last=True)[0]


def _write(
    plan: Plan, refs: dict[str, Any], held: dict[str, Any], acc: Any, group: Any, split: Any, row: Any, output: Any
) -> None:
    """Write a warpgroup's sums to the output, a tile of 64 outputs and 64 rows at a time."""
    first = output + group * (plan.strips * STRIP)
    if plan.whole:
        scales = compat.load(refs["scale"].at[0, pl.ds(first, plan.strips * STRIP)], MATRIX.reduce(1))
        acc = acc * lax.broadcast_in_dim(scales.astype(jnp.float32), acc.shape, [0])
    tile = held["out"].at[group]
    for strip in range(plan.strips):
        for rows in range(0, plan.rows, STRIP):
            part = acc[strip * STRIP : (strip + 1) * STRIP, rows : rows + STRIP].astype(tile.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            compat.transposed(tile)[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            to = pl.ds(row + rows, STRIP), pl.ds(first + strip * STRIP, STRIP)
            plgpu.copy_smem_to_gmem(tile, refs["out"].at[split, *to])
    plgpu.wait_smem_to_gmem(0)
