"""Runs kernels for GPUs on NumPy arrays, from the PTX that they are compiled to: slowly, and with no GPU.

Inside `emulated` what calls a Mosaic GPU kernel has it compiled for an H100, and run by `machine`. This needs the
environment of `environment`, set before jax is imported, and jax's CUDA plugin (`cuda_compiler`).
"""

import contextlib
import dataclasses
import functools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import compat
from pallas_kernels.ptx.launch import Launch, element_bytes, read
from pallas_kernels.ptx.machine import Machine
from pallas_kernels.ptx.memory import Wrong
from pallas_kernels.ptx.parse import parse
from pallas_kernels.ptx.translate import Code


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel's code, how it is started, and which of its outputs are inputs that it changes: {output: input}."""

    code: Code
    launch: Launch
    changed: dict[int, int]


@dataclasses.dataclass
class Emulation:
    """What is compiled for, in which order things happen, and what was run: kernels by name, and what was wrong."""

    device: Any
    dump: Path  # a folder that is emptied
    lateness: float
    seed: int
    runs: dict[str, int] = dataclasses.field(default_factory=dict)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def run(self, fn: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function that is one kernel; what it returns are the arrays that it makes, then those it changes."""
        one = SingleDeviceSharding(self.device)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), arguments)
        lowered = jax.jit(fn).lower(*shapes)
        key = lowered.as_text()
        if key not in _compiled:
            _compiled[key] = compile_kernel(lowered, self.dump)
        compiled, out = _compiled[key], jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)

        def on_host(*given: Any) -> Any:
            name = compiled.code.program.name
            self.runs[name] = self.runs.get(name, 0) + 1
            arrays = [np.asarray(x) for x in jax.tree.leaves(given)]
            try:
                found = execute(compiled, arrays, jax.tree.leaves(out), self.lateness, self.seed)
            except (Wrong, NotImplementedError) as wrong:
                self.wrong.append(f"{name}: {wrong}")
                raise
            return jax.tree.unflatten(jax.tree.structure(out), found)

        return jax.pure_callback(on_host, out, *arguments)


_compiled: dict[str, Compiled] = {}  # by what is lowered: the compiler writes nothing when it sees it again


@contextlib.contextmanager
def emulated(device: Any, dump: Path, lateness: float = 0.5, seed: int = 0) -> Iterator[Emulation]:
    """Have Mosaic GPU kernels run here that are called in this context.

    `lateness` is the chance that a copy or a product happens only when somebody waits for it; `seed` draws that, and
    which warp goes on.
    """
    kernel, in_place = plgpu.kernel, compat.gpu_kernel_in_place
    emulation = Emulation(device, dump, lateness, seed)

    def here(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: functools.partial(emulation.run, make(*args, **options))

    plgpu.kernel, compat.gpu_kernel_in_place = here(kernel), here(in_place)
    try:
        yield emulation
    finally:
        plgpu.kernel, compat.gpu_kernel_in_place = kernel, in_place


def compile_kernel(lowered: Any, dump: Path) -> Compiled:
    """Compile a function that is one kernel, and read what the compiler writes of it.

    Raises:
        RuntimeError: it wrote nothing.
    """
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir(parents=True)
    text = lowered.compile().as_text()
    ptx, log = (next(dump.glob(f"*.{kind}"), None) for kind in ("ptx", "mlir-passes.log"))
    if ptx is None or log is None:
        raise RuntimeError(
            "the compiler wrote no PTX: set `environment` before jax is imported, and compile a kernel once"
        )
    call = next(line for line in text.splitlines() if 'custom_call_target="mosaic_gpu' in line)
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", call)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", aliased[1]) if aliased else []
    changed = {int(output or 0): int(given) for output, given in pairs}
    return Compiled(Code.of(parse(ptx.read_text())), read(log.read_text()), changed)


def execute(
    kernel: Compiled, arrays: Sequence[np.ndarray], out: Sequence[Any], lateness: float = 0.0, seed: int = 0
) -> list[np.ndarray]:
    """Run a kernel; return arrays as `out` describes them: those that it makes, and then those that it changes.

    Raises:
        ValueError: arrays of other shapes than it was compiled for.
        Wrong: it does what a GPU would not do, or not reliably.
    """
    launch, inputs = kernel.launch, len(arrays)
    for (shape, _), array in zip(launch.arguments, arrays, strict=False):
        if tuple(array.shape) != shape:
            raise ValueError(f"an array of {array.shape}: the kernel was compiled for {shape}")
    sizes = [int(np.prod(shape)) * element_bytes(kind) for shape, kind in launch.arguments]
    machine = Machine(kernel.code, launch, sizes, lateness, seed)
    for output, given in kernel.changed.items():
        machine.memory.starts[inputs + output] = machine.memory.starts[given]
    for number, array in enumerate(arrays):
        machine.memory.part(number, sizes[number])[:] = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
    machine.run()
    made = [n for n in range(inputs, len(sizes)) if n - inputs not in kernel.changed]
    order = made + [n for n in range(inputs, len(sizes)) if n - inputs in kernel.changed]
    return [
        np.frombuffer(machine.memory.part(n, sizes[n]).tobytes(), x.dtype).reshape(x.shape)
        for n, x in zip(order, out, strict=True)
    ]


def environment(dump: Path) -> dict[str, str]:
    """Return the variables that have the compiler write to `dump` what is read here."""
    return {"MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_MLIR_PASSES": "1"}
