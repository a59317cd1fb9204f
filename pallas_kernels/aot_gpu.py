"""Compile the kernels' cases for an H100 with no GPU: to machine code, with the registers and spills of each.

    python -m pallas_kernels.aot_gpu [--kernels decode_attention,...] [--cases NAME,...] [--timed]

prints one JSON line a case: its kernels, the most registers a thread, the bytes spilled, and how many kernels' products
the assembler has wait for each other; or the error. Needs jax's
CUDA plugin of the version of jax, no driver: pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm
(with --no-deps --target FOLDER, and FOLDER on PYTHONPATH, to keep them apart). In a process of its own: the compiler
reads its variables once.
"""

import argparse
import json
import os
import re
import shutil
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


def compile_cases(names: list[str], cases: list[str] | None, timed: bool, dump: Path) -> Iterator[dict[str, Any]]:
    """Compile the cases of kernels, and yield a line for each."""
    from pallas_kernels.kernels import kernel as find

    for name in names:
        found = find(name)
        if found.gpu is None:
            continue
        for case in (found.gpu_timed or found.timed) if timed else (*found.tests, *found.gpu_tests):
            if cases is not None and case.name not in cases:
                continue
            line: dict[str, Any] = {"kernel": name, "case": case.name}
            try:
                line |= compile_case(found, case.narrowed(), dump)
            except NotImplementedError as error:
                line["unsupported"] = str(error)
            except Exception as error:  # whatever the compiler says is the answer
                line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            yield line


def main(argv: list[str] | None = None) -> None:
    """Compile what the command line names."""
    from pallas_kernels.kernels import ON_GPUS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(ON_GPUS))
    parser.add_argument("--cases", default=None, help="default: every case")
    parser.add_argument("--timed", action="store_true", help="the timed cases instead of the tests'")
    parser.add_argument("--dump", type=Path, default=None, help="keep what the compiler writes of the last case here")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        dump = args.dump or Path(folder) / "dump"
        os.environ |= {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(dump), "MOSAIC_GPU_DUMP_PTX": "1"}
        os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        names = args.cases.split(",") if args.cases else None
        for line in compile_cases(args.kernels.split(","), names, args.timed, dump):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
