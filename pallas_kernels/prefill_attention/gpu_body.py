"""The kernel of prefill attention on a Hopper GPU: warpgroups that multiply by turns, and one that copies.

A block has a warpgroup for every 64 queries and one more, which copies blocks of keys and values into a ring of stages.
The former go through the slots in step: while one has the matrix unit, another computes exponentials. Within one, the
product of a step's queries and keys is under way together with that of the weights and values of the step before it,
which lasts on while the exponentials are computed (FlashAttention-3, 2407.08608).
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.prefill_attention.gpu_attend import attend
from pallas_kernels.prefill_attention.gpu_plan import ROWS, TILE, Items, Plan, stage_of

REGISTERS = {2: (240, 24), 3: (160, 32)}  # a thread, where there are so many warpgroups that multiply


def scratch(plan: Plan, H: int, dtype: Any, stages: int, return_lse: bool, apart: bool) -> dict[str, Any]:
    """Return what a block has in shared memory: tiles as the matrix unit takes them, and barriers.

    `apart`: the output has memory of its own, so that the next queries are copied before it is written.
    """
    groups = plan.queries // ROWS
    tiles = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
    found = {
        "queries": plgpu.SMEM((groups, ROWS, H), dtype, transforms=tiles),
        "keys": plgpu.SMEM((stages, plan.slots, H), dtype, transforms=tiles),
        "values": plgpu.SMEM((stages, plan.slots, H), dtype, transforms=tiles),
        "queries_ready": plgpu.Barrier(num_barriers=groups),
        "queries_free": plgpu.Barrier(num_barriers=groups),
        "keys_ready": plgpu.Barrier(num_barriers=stages),
        "values_ready": plgpu.Barrier(num_barriers=stages),
        "keys_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "values_free": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=groups),
    }
    if apart:
        found["out"] = plgpu.SMEM((groups, ROWS, H), dtype, transforms=tiles)
    if return_lse:
        found["sums"] = plgpu.SMEM((groups, ROWS), jnp.float32)
    return found


def body(*refs, names: list[str], plan: Plan, scale: float, softcap: float | None, memory: dict[str, Any]):
    """Attend: some blocks of queries, each of one head, a grid point. `names`: of the arrays in the GPU's memory."""
    arrays = dict(zip(names, refs, strict=True))
    group = lax.axis_index("group")
    groups = plan.queries // ROWS
    registers = REGISTERS[groups]

    def run(**held):
        def over_tiles(step):
            processor = lax.axis_index("processor")
            count = plan.tiles(processor)

            def of_tile(turn, done):
                b, head, i = plan.at(plan.tile(processor, turn))
                return step(Items(plan, arrays, b, head, i), b, head, i, turn == 0, turn == count - 1, done)

            lax.fori_loop(0, count, of_tile, jnp.int32(0))

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(registers[0], action="increase")
            over_tiles(functools.partial(attend, arrays, held, plan, group, scale, softcap))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(registers[1], action="decrease")
            over_tiles(functools.partial(_copy, arrays, held, plan))

    pl.run_scoped(run, **memory, collective_axes="group")


def _copy(arrays, held, plan, items, b, head, i, first, _, done):
    """Copy a block of queries, and the blocks of keys and values that it needs, after `done` others."""
    stages = held["keys"].shape[0]
    key_head = lax.div(head, jnp.int32(plan.N // plan.K))

    def copy(source, name, item):
        stage = stage_of(done + item, stages)
        block = pl.ds(items.block(item) * plan.slots, plan.slots)

        @pl.when(done + item >= stages)
        def _():
            plgpu.barrier_wait(held[f"{name}_free"].at[stage])

        plgpu.copy_gmem_to_smem(
            arrays[source].at[b, key_head, block], held[name].at[stage], held[f"{name}_ready"].at[stage]
        )

    def step(item, _):
        copy("k", "keys", item)
        copy("v", "values", item)
        return ()

    copy("k", "keys", jnp.int32(0))
    for group in range(plan.queries // ROWS):
        if plan.all_tiles > plan.processors:

            @pl.when(jnp.logical_not(first))
            def _(group=group):
                plgpu.barrier_wait(held["queries_free"].at[group])

        rows = pl.ds(i * plan.queries + group * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(
            arrays["q"].at[b, rows, head], held["queries"].at[group], held["queries_ready"].at[group]
        )
    copy("v", "values", jnp.int32(0))
    lax.fori_loop(1, items.total, step, ())
    return done + items.total
