"""Compile the kernels' cases for an H100 with no GPU: to machine code, with the registers and spills of each.

    python -m pallas_kernels.aot_gpu [--kernels decode_attention,...] [--cases NAME,...] [--timed] [--run N]

prints one JSON line a case: its kernels, the most registers a thread, the bytes spilled, and how many kernels' products
the assembler has wait for each other; or the error. With --run the case's PTX is run instead, on NumPy (`ptx`) and in N
of the orders that a GPU might take: how far it is from its reference, and status 1 where one is wrong. Needs jax's
compiler for NVIDIA's GPUs, which --install fetches (132 MB). In a process of its own: the compiler reads its variables
once, and writes nothing about what it has compiled before.
"""

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_LATE = (0.5, 0.0, 1.0)  # chances that a copy or a product is late, in the orders that a case is run in
_USED = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def device() -> Any:
    """Return an H100 to compile for.

    Raises:
        RuntimeError: jax's CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    return topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]


def compile_case(kernel: Any, case: Any, dump: Path) -> dict[str, Any]:
    """Compile a case for an H100 and return what the assembler says of it; `dump` is a folder that is emptied."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import gpus

    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir(parents=True)
    one = SingleDeviceSharding(device())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), dict(case.shapes))
    given = {name: shapes.pop(name) for name in case.donated if name in shapes}

    def run(kept: Any, given: Any) -> Any:
        return kernel.gpu(**kept, **given, **case.options, blocks=case.gpu_blocks)

    with gpus.assume("h100"):
        text = jax.jit(run, donate_argnums=1).lower(shapes, given).compile().as_text()
    said = "".join(path.read_text() for path in dump.glob("*.ptxas"))
    return {
        "calls": len(re.findall(r'custom_call_target="mosaic_gpu', text)),
        "registers": max((int(n) for n in _USED.findall(said)), default=None),
        "spilled": sum(int(a) + int(b) for a, b in _SPILLS.findall(said)),
        "serialized": said.count("wgmma.mma_async instructions are serialized"),
        "aliased": len(re.findall(r"\(\d+, \{\}, (?:may|must)-alias\)", text)),
    }


def run_case(kernel: Any, case: Any, dump: Path, orders: int) -> dict[str, Any]:
    """Run a case's PTX on NumPy and return how far it is from its reference at most, and what is wrong with it."""
    import jax

    from pallas_kernels import gpu_measure, gpus
    from pallas_kernels.ptx.run import emulated

    found: dict[str, Any] = {"jax": jax.__version__, "right": True, "runs": 0}
    h100 = device()
    for order in range(orders):
        with gpus.assume("h100"), emulated(h100, dump, _LATE[order % len(_LATE)], order) as emulation:
            try:
                line = gpu_measure.check(kernel, case)
            except jax.errors.JaxRuntimeError:
                if not emulation.wrong:
                    raise
                line = {"ok": False, "wrong": emulation.wrong[0]}
        found["right"] &= line["ok"]
        found["error"] = max(found.get("error", 0.0), line.get("error", 0.0))
        found["runs"] += sum(emulation.runs.values())
        if not line["ok"]:
            found |= {"order": order} | ({"wrong": line["wrong"]} if "wrong" in line else {})
            break
    return found


def _cases(kernel: Any, timed: bool) -> tuple[Any, ...]:
    return tuple(kernel.gpu_timed or kernel.timed) if timed else (*kernel.tests, *kernel.gpu_tests)


def compile_cases(
    names: list[str], cases: list[str] | None, timed: bool, dump: Path, orders: int = 0
) -> Iterator[dict[str, Any]]:
    """Compile the cases of kernels, or run them in so many orders; yield a line for each."""
    from pallas_kernels.kernels import kernel as find

    for name in names:
        found = find(name)
        for case in _cases(found, timed):
            if cases is not None and case.name not in cases:
                continue
            line: dict[str, Any] = {"kernel": name, "case": case.name}
            try:
                if orders:
                    line |= run_case(found, case, dump, orders)
                else:
                    line |= compile_case(found, case.narrowed(), dump)
            except NotImplementedError as error:
                line["unsupported"] = str(error)
            except Exception as error:  # whatever the compiler says is the answer
                line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            yield line


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; return its status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=None, help="default: every kernel")
    parser.add_argument("--cases", default=None, help="default: every case")
    parser.add_argument("--timed", action="store_true", help="the timed cases instead of the tests'")
    parser.add_argument("--run", type=int, default=0, metavar="N", help="run the cases' PTX on NumPy, in N orders")
    parser.add_argument("--install", action="store_true", help="fetch jax's compiler for NVIDIA's GPUs first")
    parser.add_argument("--dump", type=Path, default=None, help="keep what the compiler writes of the last case here")
    args = parser.parse_args(argv)
    os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    from pallas_kernels import cuda_compiler

    try:
        if args.install:
            cuda_compiler.install()
        sys.path += cuda_compiler.find()  # before Mosaic is imported, which looks for its library then
    except RuntimeError as error:
        parser.error(str(error))
    from pallas_kernels.kernels import ON_GPUS, kernel
    from pallas_kernels.ptx.run import environment

    names = args.kernels.split(",") if args.kernels else list(ON_GPUS)
    if unknown := [name for name in names if name not in ON_GPUS]:
        parser.error(f"--kernels {unknown[0]}: must be of {', '.join(ON_GPUS)}")
    cases = args.cases.split(",") if args.cases else None
    there = {case.name for name in names for case in _cases(kernel(name), args.timed)}
    if unknown := [name for name in cases or () if name not in there]:
        parser.error(
            f"--cases {unknown[0]}: none of {', '.join(names)} has it; of them, {', '.join(sorted(there)[:8])}, ..."
        )
    if args.run < 0:
        parser.error(f"--run {args.run}: must be 1 or more orders")
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        dump = args.dump or Path(folder) / "dump"
        os.environ |= environment(dump)
        for line in compile_cases(names, cases, args.timed, dump, args.run):
            print(json.dumps(line), flush=True)
            wrong += not line.get("right", "unsupported" in line or not args.run)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
