"""Compile every test case of the kernels for TPU topologies, with no TPU: alone, and on every device under shard_map.

    python -m pallas_kernels.aot [--kernels decode_attention,...] [--chips v5e,...] [--mesh] [--cases NAME,...]

prints one JSON line a case, with the kernel calls and aliased buffers of the compiled program, or the error. Needs
libtpu. In a process of its own (`environment`): libtpu reads its flags once.
"""

import argparse
import json
import os
import re
from collections.abc import Iterator
from typing import Any

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


_OWN = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")  # of what this machine runs; libtpu aborts on unknown flags


def environment() -> dict[str, str]:
    """Return the environment in which a process without a TPU compiles for one."""
    return {name: value for name, value in os.environ.items() if name not in _OWN} | ENVIRONMENT


def compile_cases(kernel: str, chip: str, *, mesh: bool, cases: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Compile the test cases of a kernel for a chip, or for four of it under shard_map, and yield a line for each."""
    from pallas_kernels import chips
    from pallas_kernels.kernels import kernel as find

    found = find(kernel)
    for case in found.tests:
        if cases is not None and case.name not in cases:
            continue
        line: dict[str, Any] = {"kernel": kernel, "case": case.name, "chip": chip, "devices": 4 if mesh else 1}
        try:
            with chips.assume(chip):
                text = _lowered(found, case, chips.CHIPS[chip], mesh).compile().as_text()
            line["calls"] = len(re.findall(r'custom_call_target="tpu_custom_call"', text))
            line["aliased"] = len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", text))
        except Exception as error:  # whatever the compiler says is the answer
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        yield line


def _lowered(kernel: Any, case: Any, chip: Any, mesh: bool) -> Any:
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

    from pallas_kernels import compat

    devices = compat.topology_devices(chip.topology)
    over = Mesh(np.array(devices[:4]).reshape(4), ("x",))
    one, split = SingleDeviceSharding(devices[0]), NamedSharding(over, PartitionSpec("x"))

    def struct(x: Any) -> jax.ShapeDtypeStruct:
        shape = (4, *x.shape) if mesh else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=split if mesh else one)

    shapes = jax.tree.map(struct, dict(case.shapes))
    given = {name: shapes.pop(name) for name in case.donated if name in shapes}

    def run(kept: Any, given: Any) -> Any:
        return kernel.tpu(**kept, **given, **case.options, blocks=case.blocks)

    def each(kept: Any, given: Any) -> Any:
        found = run(*jax.tree.map(lambda x: x[0], (kept, given)))
        return jax.tree.map(lambda x: x[None], found)

    parts = PartitionSpec("x")
    program = jax.shard_map(each, mesh=over, in_specs=(parts, parts), out_specs=parts, check_vma=False) if mesh else run
    return jax.jit(program, donate_argnums=1).lower(shapes, given)


def main(argv: list[str] | None = None) -> None:
    """Compile what the command line names."""
    from pallas_kernels import chips
    from pallas_kernels.kernels import KERNELS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--chips", default=",".join(chips.CHIPS))
    parser.add_argument("--cases", default=None, help="default: every test case")
    parser.add_argument("--mesh", action="store_true", help="under shard_map on four devices")
    args = parser.parse_args(argv)
    for chip in args.chips.split(","):
        for kernel in args.kernels.split(","):
            names = args.cases.split(",") if args.cases else None
            for line in compile_cases(kernel, chip, mesh=args.mesh, cases=names):
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
