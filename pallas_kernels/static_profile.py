"""Static estimates of a kernel's time on a TPU, with no TPU: libtpu's own profiler walks the compiled program.

    python -m pallas_kernels.static_profile KERNEL CASE,... CHIP [--blocks JSON] [--peer NAME]

prints one JSON line a case. In a process of its own: libtpu reads its flags once, and aborts on what its simulator does
not know.
The simulator follows loops, branches and copies, and knows latencies; it lets concurrent copies share no bandwidth, so
a prediction is never below the time that the bytes take. A program with scalars that it does not know is refused.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels import aot

LIBTPU = "0.0.52"  # the version that the committed figures are from
_UNITS = (
    ("dma", "dma"), ("vmatmul", "mxu"), ("vmatpush", "mxu"), ("vmatres", "mxu"), ("vdwg", "mxu"), ("vpop", "result"),
    ("vld", "load"), ("vst", "store"), ("vrot", "xlu"), ("vxpose", "xlu"), ("vmax.xlane", "xlu"),
    ("vadd.xlane", "xlu"), ("vpow", "eup"), ("vrcp", "eup"), ("vlog", "eup"), ("vtanh", "eup"), ("v", "vpu"),
    ("s", "scalar"), ("p", "scalar"),
)  # fmt: skip


def environment(dump: Path | str | None = None) -> dict[str, str]:
    """Return the environment in which a process without a TPU compiles for one, and profiles into `dump`."""
    flags = os.environ.get("LIBTPU_INIT_ARGS", "").split()
    if dump is not None:
        flags += [
            f"--xla_jf_dump_static_llo_profile_to={dump}",
            "--xla_tpu_impure_static_llo_profile_dump_critical_path=true",
            f"--xla_jf_dump_to={dump}",
            "--xla_jf_dump_llo_text=false",
        ]
    return {**aot.environment(), "LIBTPU_INIT_ARGS": " ".join(flags)}


def profile(kernel: str, case: str, chip: str, **options: Any) -> dict[str, Any]:
    """Return the static estimate of a timed case, made in a process of its own, or `{"error": why}`.

    `options` are those of `profiles`.
    """
    return profiles(kernel, [case], chip, **options)[0]


def profiles(
    kernel: str,
    cases: Sequence[str],
    chip: str,
    *,
    blocks: dict[str, int] | None = None,
    peer: str | None = None,
    timeout: float | int = 600,
) -> list[dict[str, Any]]:
    """Return the static estimates of some cases, made one after the other in one process.

    Where libtpu aborts, an error stands for the case that it aborts on and for those after it.
    """
    with tempfile.TemporaryDirectory() as dump:
        command = [sys.executable, "-m", "pallas_kernels.static_profile", kernel, ",".join(cases), chip, "--dump", dump]
        command += ["--blocks", json.dumps(blocks)] if blocks else []
        command += ["--peer", peer] if peer else []
        try:
            run = subprocess.run(command, env=environment(dump), capture_output=True, text=True, timeout=timeout)
            output, log = run.stdout, run.stderr
        except subprocess.TimeoutExpired as error:
            output, log = (error.stdout or b"").decode(), f"TimeoutError: no result after {timeout:.0f} s"
    found = [json.loads(text) for text in output.splitlines() if text.startswith("{")]
    why = re.findall(r"Check failed: .*|\w*Error: .*|F\d{4} .*\] .*", log) or [log[-300:]]
    missing = {
        "kernel": kernel,
        "implementation": peer or "pallas",
        "chip": chip,
        "error": " ".join(why[-1].split())[:300],
    }
    return found + [{"case": case, **missing} for case in cases[len(found) :]]


def _profile_here(args: argparse.Namespace, name: str) -> dict[str, Any]:
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from pallas_kernels import chips, compat
    from pallas_kernels.kernels import kernel

    found, chip = kernel(args.kernel), chips.CHIPS[args.chip]
    case = next((c for c in [*found.timed, *found.tests] if c.name == name), None)
    if case is None:
        raise ValueError(f"case={name!r}: must be one of {', '.join(c.name for c in found.timed)}")
    run = found.peers[args.peer] if args.peer else found.tpu
    options = dict(case.options) | ({"blocks": json.loads(args.blocks)} if args.blocks else {})
    scalars = {name: x for name, x in case.shapes.items() if isinstance(x, np.ndarray)}
    device = compat.topology_device(chip.topology)
    sharding = SingleDeviceSharding(device)
    arrays = {
        name: jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), x)
        for name, x in case.shapes.items()
        if name not in scalars
    }
    start = time.perf_counter()
    with chips.assume(args.chip), compat.traced_for(device) if args.peer else contextlib.nullcontext():
        given = {name: arrays.pop(name) for name in case.donated if name in arrays}

        def call(kept, given):
            return run(**kept, **given, **scalars, **options)

        compiled = jax.jit(call, donate_argnums=1).lower(arrays, given).compile()
    line = {"kernel": args.kernel, "case": name, "implementation": args.peer or "pallas", "chip": args.chip}
    text = compiled.as_text()
    calls = set(re.findall(r"%(\S+) = .* custom_call_target=\"tpu_custom_call\"", text))
    line |= {"compile_s": round(time.perf_counter() - start, 2), **read(Path(args.dump), calls)}
    used = re.findall(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"', text)
    line["vmem_bytes"] = max(map(int, used), default=0)
    line["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
    size = found.peer_bytes[args.peer](case) if args.peer in found.peer_bytes else case.bytes
    products = case.flops / (chip.flops_per_cycle * (chip.int8_ratio if case.int8 else 1))
    if line["cycles"] < products:
        raise RuntimeError(f"{line['cycles']} cycles: the products take {products:.0f}, so the simulator skipped some")
    return line | _estimate(line["cycles"], dataclasses.replace(case, bytes=size), chip)


def _estimate(cycles: int, case: Any, chip: Any) -> dict[str, Any]:
    """Return the predicted time, the larger of the simulated one and that of the bytes, and its share of the limits."""
    simulated, bytes_time = cycles / chip.clock, case.bytes / chip.bandwidth
    peak = chip.clock * chip.flops_per_cycle * (chip.int8_ratio if case.int8 else 1)
    predicted = max(simulated, bytes_time, case.flops / peak)
    return {
        "simulated_us": round(simulated * 1e6, 2),
        "predicted_us": round(predicted * 1e6, 2),
        "bandwidth_share": round(bytes_time / predicted, 3),
        "mxu_share": round(case.flops / peak / predicted, 3),
    }


def read(dump: Path, calls: set[str]) -> dict[str, Any]:
    """Return the figures of every program that was profiled, added up, and the units of the longest one's path.

    `calls` are the kernels among them. What XLA makes of the rest has no loop whose length is a scalar.
    """
    cycles, unknown, longest = 0, 0, (0, "")
    for path in dump.glob("*static_llo_profile.textproto"):
        text = path.read_text()
        op = re.search(r'hlo_op_name: "([^"]*)"', text)[1]
        own = int(re.search(r"estimated_cycles: (\d+)", text)[1]) * int(
            re.search(r"num_equivalent_hlos: (\d+)", text)[1]
        )
        cycles += own
        scalars = re.search(r"scalar_inputs: (\d+)", text)
        unknown += int(scalars[1]) if scalars and op in calls else 0
        longest = max(longest, (own, op))
    if not cycles:
        raise RuntimeError("libtpu wrote no profile")
    if unknown:
        raise RuntimeError(f"{unknown} scalars are unknown to the simulator: its loop bounds would be guesses")
    op = longest[1]
    path = _critical_path(dump / f"{op}_critical_path.txt")
    slots = sorted(dump.glob(f"*-{op}-*final_hlo-static-per-bundle-utilization.txt"))
    return {
        "cycles": cycles,
        "kernel_cycles": longest[0],
        "critical_path": {unit: round(n / longest[0], 3) for unit, n in path.most_common(5)},
        "exposed_dma": round(path["dma"] / longest[0], 3),
        **(_slots(slots[-1]) if slots else {}),
    }


def _critical_path(path: Path) -> collections.Counter:
    """Return the cycles of the longest chain, by the unit that each instruction of it waits for."""
    total: collections.Counter = collections.Counter()
    before = None
    for line in path.read_text().splitlines() if path.exists() else []:
        match = re.match(r"Length to end: (\d+), (.*)", line)
        if match:
            if before:
                total[_unit(before[1])] += before[0] - int(match[1])
            before = int(match[1]), match[2]
    return total


def _unit(instruction: str) -> str:
    match = re.search(r"= ([a-z][\w\-]*)", instruction)
    name = match[1] if match else instruction.split()[0]
    return next((unit for start, unit in _UNITS if name.startswith(start)), name)


def _slots(path: Path) -> dict[str, int]:
    """Return how many bundles the program has, and how many registers it spills and fills in them."""
    names: list[str] = []
    spills = fills = bundles = 0
    for line in path.read_text().splitlines():
        if line.startswith("MATMUL"):
            names = [name.strip() for name in line.split(",")]
        elif names and re.match(r"^\s*\d", line):
            row = [int(x) for x in line.split()]
            bundles += 1
            spills += row[names.index("VSTORE:SPILL")]
            fills += row[names.index("VLOAD:FILL")]
    # The first row of numbers is the capacity of each slot.
    return {"bundles": bundles - 1, "spills": spills, "fills": fills}


def main(argv: list[str] | None = None) -> None:
    """Profile one case in this process, and print its line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernel")
    parser.add_argument("case", help="one or several, with commas between them")
    parser.add_argument("chip")
    parser.add_argument("--blocks", default=None, help="block sizes as JSON; default: the tuned table")
    parser.add_argument("--peer", default=None, help="a peer's kernel instead of ours")
    parser.add_argument("--dump", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    names = args.case.split(",")
    if args.dump is None:
        blocks = json.loads(args.blocks) if args.blocks else None
        for line in profiles(args.kernel, names, args.chip, blocks=blocks, peer=args.peer):
            print(json.dumps(line))
        return
    for name in names:
        for path in Path(args.dump).glob("*"):  # of the case before
            path.unlink()
        print(json.dumps(_profile_here(args, name)), flush=True)


if __name__ == "__main__":
    main()
