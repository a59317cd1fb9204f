"""Every difference between the versions of jax that the kernels run on (0.10.2, 0.11, 0.12): here and nowhere else."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu

ANY = pltpu.HBM  # left where it is
VMEM = pltpu.VMEM
SMEM = pltpu.SMEM


def dma_semaphores(*shape: int) -> Any:
    """Return the scratch shape of an array of DMA semaphores."""
    return pltpu.SemaphoreType.DMA(shape)


def compiler_params(semantics: tuple[str, ...], vmem_limit: int) -> Any:
    """Return the parameters of a Mosaic TPU call: what each grid axis may do, and the VMEM that it may use in bytes."""
    return pltpu.CompilerParams(dimension_semantics=semantics or None, vmem_limit_bytes=vmem_limit)


def interpret_params(detect_races: bool, dma: str) -> Any:
    """Return how to interpret a TPU kernel with its DMAs and semaphores; memory that nothing wrote is NaN."""
    return pltpu.InterpretParams(detect_races=detect_races, dma_execution_mode=dma, uninitialized_memory="nan")


def found_races() -> bool:
    """Return whether the last kernel that was interpreted with `detect_races` had a race."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return bool(interpret_pallas_call.races.races_found)


def reset_interpreter() -> None:
    """Forget what the interpreter holds; needed after a kernel that raised."""
    pltpu.reset_tpu_interpret_mode_state()


def topology_device(name: str) -> jax.Device:
    """Return a device of a TPU topology that libtpu can compile for, such as `v5e:2x2`; no TPU is needed."""
    return topology_devices(name)[0]


def topology_devices(name: str) -> list[jax.Device]:
    """Return the devices of a TPU topology that libtpu can compile for."""
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def traced_for(device: jax.Device) -> Any:
    """Return a context in which Pallas takes `device`'s kind for that of the devices here, which are no TPUs."""
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=kind))


def kernel_times(run: Any) -> list[tuple[str, float]]:
    """Return the name and the milliseconds of every kernel that `run()` has a GPU run, by CUPTI."""
    from jax._src.lib import mosaic_gpu

    extension = mosaic_gpu._mosaic_gpu_ext
    extension._cupti_init()
    try:
        jax.block_until_ready(run())
    finally:
        found = extension._cupti_get_timings(True)
    return list(found)


def load(ref: Any, layout: Any, optimized: bool = False) -> Any:
    """Return what a ref of a GPU kernel holds, in a layout of registers; `optimized` raises where banks conflict."""
    if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty:
        return plgpu.load(ref, (), layout=layout, optimized=optimized)
    return plgpu.load(ref, layout=layout, optimized=optimized)


def mlir() -> tuple[Any, Any, Any]:
    """Return what a GPU kernel is written in below Pallas: MLIR, its LLVM dialect, and what Mosaic makes of them."""
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import llvm
    from jax.experimental.mosaic.gpu import utils

    return ir, llvm, utils


def transposed(ref: Any) -> Any:
    """Return a matrix in a GPU's shared memory with its axes swapped."""
    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def gpu_kernel(body: Any, *, name: str, interpret: Any = False, auto_barriers: bool = True, **options: Any) -> Any:
    """Return a function of arrays that runs a Mosaic GPU kernel, which has the code of every thread and the fast exp.

    With `auto_barriers` its threads wait for each other at every copy.
    """
    params = _gpu_params(auto_barriers)
    return plgpu.kernel(body, kernel_name=name, compiler_params=params, interpret=interpret, **options)


def gpu_kernel_in_place(
    body: Any, *, name: str, out_types: list[Any], grid: tuple[int, ...], grid_names: tuple[str, ...]
):
    """Return a function of two lists of arrays, (kept, changed), that runs a Mosaic GPU kernel as `gpu_kernel` does.

    `body` gets the refs of both and the outputs', and may write to those of the second list: their arrays are changed
    in place where nobody else has them. Returns (outputs, changed). There are no barriers of its own.
    """
    mesh = plgpu.Mesh(grid=grid, grid_names=grid_names, kernel_name=name)
    run = pl.kernel(body, out_type=out_types, mesh=mesh, compiler_params=_gpu_params(False), name=name)

    def call(kept: list[jax.Array], changed: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        def on(refs: Any) -> None:
            outputs, changed = refs
            for ref, found in zip(outputs, run(*kept, *changed), strict=True):
                ref[...] = found

        return pl.run_state(on)(([jnp.zeros(x.shape, x.dtype) for x in out_types], changed))

    return call


def _gpu_params(auto_barriers: bool) -> Any:
    return plgpu.CompilerParams(
        approx_math=True,
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=not auto_barriers,
    )
