"""The process that compiles: reads a request as JSON, writes a line of JSON for each program that it was asked for.

In a process of its own, since libtpu reads its environment once, and ends the process where it can't compile.
"""

import json
import math
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding

from jaxinfer.models.config import config_from_dict
from jaxinfer.plan import hlo
from jaxinfer.plan.building import Built, build
from jaxinfer.plan.topology import Topology, parse_topology
from jaxinfer.sharding.mesh import make_mesh

_AT_ONCE = 2  # programs: a compiler takes one processor, and some GB of memory
_H100 = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""  # what NVIDIA's tool and the CUDA runtime say of one


def devices_of(topology: Topology) -> list[Any]:
    """Return the devices of a topology: this process's own for a CPU, else of machines that are not there."""
    from jax.experimental import topologies

    if topology.kind == "cpu":
        return jax.devices()
    if topology.is_tpu:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
    return topologies.get_topology_desc("plan", "cuda", target_config=_H100, topology=f"1x1x{topology.devices}").devices


def mesh_of(sizes: dict[str, int], devices: list[Any]) -> Mesh:
    """Return the mesh, with axes that are parts of a dimension of the torus where no whole dimensions make them."""
    try:
        return make_mesh(sizes, devices)
    except NotImplementedError:  # jax.make_mesh splits no dimension of a torus by itself
        shape = tuple(sizes.values())
        return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), tuple(sizes))


def places_of(devices: Any) -> list[list[int]]:
    """Return the coordinates of a mesh's devices and, last, their core, in the mesh's order."""

    def place(i: int, device: Any) -> list[int]:
        if not hasattr(device, "coords"):
            return [i, 0]
        return [*device.coords, getattr(device, "core_on_chip", 0)]

    return [place(i, device) for i, device in enumerate(devices.flat)]


class Clock:
    """Processor seconds of this process, each told once, to the program that asks next: some compile at once."""

    def __init__(self) -> None:
        self._told, self._lock = time.process_time(), threading.Lock()

    def read(self) -> float:
        """Return the seconds since it was read last."""
        with self._lock:
            before, self._told = self._told, time.process_time()
            return self._told - before


def lower_step(built: Built, job: dict[str, Any]) -> jax.stages.Lowered:
    """Return one program, traced: `rows` rows of `tokens` new tokens into a cache of `context`."""
    built = built.cut(job["layers"])
    cache, cache_shardings = built.cache(job["rows"], job["context"])

    def lie(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        names = ("batch", *(None for _ in shape[1:]))
        return jax.ShapeDtypeStruct(
            shape, jnp.int32, sharding=NamedSharding(built.mesh, built.rules.spec(names, shape, built.sizes))
        )

    def step(model: Any, cache: Any, tokens: jax.Array, counts: jax.Array) -> tuple[Any, jax.Array]:
        hidden, cache = model(tokens, cache, counts)
        last = jnp.take_along_axis(hidden, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
        return cache, jnp.argmax(model.logits(last)[:, 0], axis=-1).astype(jnp.int32)

    given = lie(cache, cache_shardings), rows(job["rows"], job["tokens"]), rows(job["rows"])
    return jax.jit(step, donate_argnums=1).lower(lie(built.model, built.shardings), *given)


def compile_step(lowered: jax.stages.Lowered) -> dict[str, Any]:
    """Return what the compiler says of a program."""
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    try:
        found = hlo.read(compiled.as_text())
    except jax.errors.JaxRuntimeError:  # a newer libtpu writes programs that this jaxlib can't read
        found = None
    return {
        "arguments": memory.argument_size_in_bytes,
        "cache": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "flops": cost.get("flops"),
        "bytes": cost.get("bytes accessed"),
        "kernels": None if found is None else dict(found.kernels),
        "launches": None if found is None else found.launches.total(),
        "collectives": None if found is None else [[*c, n] for c, n in found.collectives.items()],
    }


def run(request: dict[str, Any], write: Any) -> None:
    """Compile every job of a request; an error is the answer of its job."""
    topology = parse_topology(request["topology"])
    mesh = mesh_of(request["mesh"], devices_of(topology))
    write({"places": places_of(np.asarray(mesh.devices))})
    specs = [spec if isinstance(spec, str) else tuple(spec) for spec in request["passes"]]
    built = build(config_from_dict(request["config"]), request["dtype"], specs, mesh, request["rules"])
    clock, tracing, writing = Clock(), threading.Lock(), threading.Lock()

    def answer(job: dict[str, Any]) -> None:
        try:
            with tracing:  # which is Python's work; the compiler leaves Python alone meanwhile
                begin = time.perf_counter()
                lowered = lower_step(built, job)
                middle = time.perf_counter()
            found = compile_step(lowered)
            found["trace_seconds"] = round(middle - begin, 3)
            found["compile_seconds"] = round(time.perf_counter() - middle, 3)
            found["processor_seconds"] = round(clock.read(), 3)
        except Exception as error:  # whatever the compiler says is the answer
            found = {"error": explain(error)}
        with writing:
            write({"job": job["name"], **found})

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(answer, request["jobs"]))


def explain(error: Exception) -> str:
    """Return a compiler's error as one line, and of memory that ran out what it says of it."""
    text = " ".join(str(error).split())
    short = re.search(r"Ran out of memory in memory space hbm\. Used ([\d.]+\w) of ([\d.]+\w) hbm", text)
    if short:
        return f"the compiler ran out of memory: it needs {short[1]} of {short[2]}"
    return f"{type(error).__name__}: {text[:300]}"


def main() -> None:
    """Answer the request on stdin."""
    out = sys.stdout

    def write(line: dict[str, Any]) -> None:
        print(json.dumps(line, default=_plain), file=out, flush=True)

    run(json.load(sys.stdin), write)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else math.nan


if __name__ == "__main__":
    main()
