"""What a static estimate is worth: kernels whose times on a TPU are published, through the same simulator.

    pip install --no-deps --target PEER tokamax immutabledict einshape typeguard==2.13.3 pydantic pydantic-core \\
        annotated-types typing-inspection absl-py
    python scripts/replay_measured.py --tokamax PEER [--kernel attention] [--rows 4096] [--out replay.jsonl]
        [--timeout 1800]

tokamax ships the times of its kernels with the tile sizes that it found: of the grouped matrix product (`ragged_dot`)
on a TPU v5e, and of splash attention on a TPU 7x (`replay_attention.py`). Each is compiled and simulated with those
tiles. Of a grouped product the first groups that fill `--rows` rows are (a whole one is too long to simulate), and
scaled by the products. Prints a JSON line an entry, and the distribution of predicted over measured times. A run that
was stopped goes on where it was, with the same --out. The product never imports tokamax.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import replay_attention

from pallas_kernels import chips, compat, static_profile

DATA = "tokamax/data/autotuning/tpu_v5_lite/pallas_mosaic_tpu_ragged_dot.json"
KERNEL = "tokamax._src.ops.ragged_dot.pallas_mosaic_tpu_kernel"


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the measured products that the kernel's forward form makes, without a second output."""
    found = []
    for spec, configs in json.loads((folder / DATA).read_text()).items():
        spec = json.loads(spec)
        contracted = spec["ragged_dot_dimension_numbers"]["dot_dimension_numbers"][0]
        if spec["return_residuals"] or contracted not in ([[1], [1]], [[1], [2]]):
            continue
        for config, timing in configs.items():
            shapes = {x: [int(n) for n in re.findall(r"\d+", spec[x].split("[")[1])] for x in ("lhs", "rhs")}
            measured = 1e3 * statistics.median(timing["evaluation_times_ms"])
            found.append(
                {**shapes, "groups": spec["group_sizes"], "turned": contracted[1] == [2], "measured_us": measured}
                | {"config": json.loads(config)}
            )
    return found


def simulate(entry: dict[str, Any], rows: int, dump: str) -> dict[str, Any]:
    """Return the line of an entry, simulated in this process."""
    import importlib

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    kernel = importlib.import_module(KERNEL)
    total, inner = entry["lhs"]
    count, used = 0, 0
    while count < len(entry["groups"]) and (count == 0 or used + entry["groups"][count] <= rows):
        used += entry["groups"][count]
        count += 1
    sizes = np.array(entry["groups"][:count], np.int32)
    config, chip = entry["config"], chips.CHIPS["v5e"]
    tile = config["tile_m"]
    padded = -(-used // tile) * tile
    outputs = entry["rhs"][1] if entry["turned"] else entry["rhs"][2]
    one = SingleDeviceSharding(compat.topology_device(chip.topology))
    lhs = jax.ShapeDtypeStruct((padded, inner), jnp.bfloat16, sharding=one)
    rhs = jax.ShapeDtypeStruct((count, *entry["rhs"][1:]), jnp.bfloat16, sharding=one)
    plan = kernel.make_group_metadata

    def known(**given: Any) -> Any:
        with jax.ensure_compile_time_eval():
            found = plan(**{**given, "group_sizes": jnp.asarray(sizes), "start_group": jnp.int32(0)})
            return jax.tree.map(np.asarray, found[0]), int(found[1])

    def product(lhs: Any, rhs: Any) -> Any:
        return kernel.gmm.__wrapped__(
            lhs, rhs, jnp.asarray(sizes), (jax.lax.Precision.DEFAULT,) * 2, jnp.bfloat16,
            tiling=(tile, config["tile_k"], config["tile_n"]), input_buffer_count=config["input_buffer_count"],
            transpose_rhs=entry["turned"],
        )  # fmt: skip

    mesh = jax.sharding.AbstractMesh(
        (1,),
        ("x",),
        abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    )
    patched = mock.patch.multiple(
        kernel, make_group_metadata=known, common=mock.Mock(wraps=kernel.common, custom_buffered_pallas_call=pipeline)
    )
    with patched, jax.sharding.use_abstract_mesh(mesh):
        compiled = jax.jit(product).lower(lhs, rhs).compile()
    calls = set(re.findall(r"%(\S+) = .* custom_call_target=\"tpu_custom_call\"", compiled.as_text()))
    cycles = static_profile.read(Path(dump), calls)["cycles"]
    flops = 2.0 * used * inner * outputs
    size = 2.0 * (used * inner + count * inner * outputs + used * outputs)
    limits = (cycles / chip.clock, size / chip.bandwidth, flops / (chip.clock * chip.flops_per_cycle))
    scaled = total / used
    return {"cycles": cycles, "scaled": round(scaled, 2), "predicted_us": round(1e6 * max(limits) * scaled, 1)}


def pipeline(
    kernel: Any, out_shape: Any, grid_spec: Any, compiler_params: Any, input_buffer_count: Any, **_: Any
) -> Any:
    """Stand in for tokamax's way to call a kernel: the same pipeline, with its scalars as constants in SMEM."""
    import dataclasses

    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def call(metadata: Any, _: Any, *operands: Any) -> Any:
        values = [np.atleast_1d(x).astype(np.int32) for x in metadata] + [np.zeros(1, np.int32)]

        def body(*refs: Any) -> None:
            scalars, rest = refs[len(refs) - len(values) :], refs[: len(refs) - len(values)]
            for ref, value in zip(scalars, values, strict=True):
                for i, x in enumerate(value):
                    ref[i] = jnp.int32(int(x))
            bound = (tuple(scalars[:-1]), scalars[-1])

            def bind(spec: Any, buffers: int = 2) -> Any:
                index = spec.index_map
                spec = pl.BlockSpec(spec.block_shape, lambda *at: index(*at, *bound))
                if buffers == 2:
                    return spec
                return dataclasses.replace(spec, pipeline_mode=pl.Buffered(buffers, use_lookahead=True))

            given, (scratch,) = rest[:-1], rest[-1:]
            pltpu.emit_pipeline(
                lambda *args: kernel(*bound, *args, scratch),
                grid=tuple(int(n) for n in grid_spec.grid),
                in_specs=[bind(s, n) for s, n in zip(grid_spec.in_specs, input_buffer_count, strict=True)],
                out_specs=bind(grid_spec.out_specs),
                dimension_semantics=compiler_params.dimension_semantics,
            )(*given)

        return pl.pallas_call(
            body,
            out_shape,
            in_specs=[pl.BlockSpec(memory_space=compat.ANY)] * len(operands),
            out_specs=pl.BlockSpec(memory_space=compat.ANY),
            scratch_shapes=[*grid_spec.scratch_shapes, *(compat.SMEM(x.shape, jnp.int32) for x in values)],
            compiler_params=compat.compiler_params((), chips.CHIPS["v5e"].vmem_limit),
            name="ragged_dot",
        )(*operands)

    return call


def main(argv: list[str] | None = None) -> None:
    """Replay every entry, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokamax", type=Path, required=True, help="the folder that it is installed in")
    parser.add_argument("--kernel", choices=["ragged_dot", "attention"], default="ragged_dot")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=None, help="also write the lines to this file, and go on with it")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that an entry may take")
    parser.add_argument("--entry", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--dump", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    attention = args.kernel == "attention"
    found = (replay_attention.entries if attention else entries)(args.tokamax)
    if args.entry is not None:
        sys.path.append(str(args.tokamax))
        entry = found[args.entry]
        line = replay_attention.simulate(entry, args.dump) if attention else simulate(entry, args.rows, args.dump)
        print(json.dumps(line))
        return
    chip = replay_attention.CHIP if attention else "v5e"
    written = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    done = {line["entry"]: line for line in map(json.loads, written) if line["chip"] == chip}
    for i, entry in enumerate(found):
        if i in done:
            continue
        shown = {name: x for name, x in entry.items() if name != "groups"}
        done[i] = {"chip": chip, "entry": i, **shown, **replayed(i, entry, argv or sys.argv[1:], args.timeout)}
        print(json.dumps(done[i]), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(done[i]) + os.linesep)
    ratios = sorted(line["ratio"] for line in done.values() if "ratio" in line)
    if ratios:
        print(
            f"predicted / measured of {len(ratios)} of {len(found)}: geometric mean "
            f"{statistics.geometric_mean(ratios):.2f}, median {statistics.median(ratios):.2f}, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )


def replayed(number: int, entry: dict[str, Any], options: list[str], timeout: float) -> dict[str, Any]:
    """Return what is known of an entry once it was simulated in a process of its own, or why it could not be."""
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, __file__, *options, "--entry", str(number), "--dump", dump]
        environment = static_profile.environment(dump)
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"error": f"no result after {timeout:.0f} s"}
    answer = [text for text in run.stdout.splitlines() if text.startswith("{")]
    if not answer:
        return {"error": " ".join(run.stderr.split())[-300:]}
    line = json.loads(answer[0])
    return {**line, "ratio": round(line["predicted_us"] / entry["measured_us"], 3)}


if __name__ == "__main__":
    main()
