"""Time the kernels, each case beside others' kernels for the same work. For TPUs by static estimates, with no TPU.

    python scripts/bench_kernels.py --gpu [--kernels ...] [--cases ...] [--out gpu.jsonl]   on the GPU that is here
    python scripts/bench_kernels.py --tpu-static v5e,v6e [--kernels ...] [--cases ...] [--out kernels.jsonl]
    python scripts/bench_kernels.py --table kernels.jsonl [--cases ...]   the lines of such a run as a table
    python scripts/bench_kernels.py --budget kernels.jsonl       its cycles as the budget that the tests hold
    python scripts/bench_kernels.py --gpu-blocks gpu.jsonl       the best blocks of a --tune as the kernels' tables

Prints one JSON line a case, chip and implementation: simulated cycles; the predicted time, which is the larger of the
simulated time and that of the bytes and products; its share of the bandwidth and of the MXU's peak; VMEM, registers
spilled, and the share of the cycles that wait for a copy. Needs libtpu: pip install -e ".[test]". A run that was
stopped goes on where it was, with the same --out.

With --gpu the cases are first checked against their references on the device (--check: only that, --no-check: not),
and then timed beside the copy bandwidth and the matmul rate measured in that run; --tune tries all candidate blocks.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pallas_kernels import chips, gpu_bench, static_profile, tuning
from pallas_kernels.kernels import KERNELS, ON_GPUS, kernel

BUDGET = Path(__file__).resolve().parent.parent / "pallas_kernels" / "budget.json"
KEY = ("kernel", "case", "chip", "implementation")


def jobs(kernels: list[str], names: list[str], cases: list[str] | None, peers: bool) -> list[dict[str, str]]:
    """Return what is to be measured, as the keys of its lines."""
    found = []
    for name in kernels:
        for case in kernel(name).timed:
            if cases is not None and case.name not in cases:
                continue
            for chip in names:
                for implementation in ("pallas", *(kernel(name).peers if peers else ())):
                    found.append({"kernel": name, "case": case.name, "chip": chip, "implementation": implementation})
    return found


def measure(job: dict[str, str]) -> dict[str, Any]:
    """Return the static estimate of a job."""
    peer = None if job["implementation"] == "pallas" else job["implementation"]
    line = static_profile.profile(job["kernel"], job["case"], job["chip"], peer=peer)
    device = f"none: static estimate for a TPU {job['chip']}, libtpu {static_profile.LIBTPU}"
    return {**line, "device": device}


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file that is there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Return the lines as a Markdown table: a case a row; times, shares of the nearest limit, and others' times."""
    names = list(dict.fromkeys(line["chip"] for line in lines))
    rows = [f"| kernel | case | {' | '.join(f'{name} | others' for name in names)} |"]
    rows += ["|---|---|" + "---:|---|" * len(names)]
    for place in dict.fromkeys((line["kernel"], line["case"]) for line in lines):
        cells = []
        for name in names:
            here = [x for x in lines if (x["kernel"], x["case"]) == place and x["chip"] == name]
            own = next((x for x in here if x["implementation"] == "pallas"), {"error": "not run"})
            cells += [_own(own), _others(own, [x for x in here if x is not own])]
        rows.append(f"| {' | '.join([*place, *cells])} |")
    return "\n".join(rows)


def _own(line: dict[str, Any]) -> str:
    if "error" in line:
        return line["error"][:60]
    share, limit = max((line["bandwidth_share"], "HBM"), (line["mxu_share"], "MXU"))
    return f"{_time(line['predicted_us'])}, {share:.0%} {limit}"


def _others(own: dict[str, Any], others: list[dict[str, Any]]) -> str:
    # What the simulator can't follow, or the peer can't do, is left out; the lines say why.
    able = [x for x in others if "error" not in x and "error" not in own]
    return ", ".join(f"{x['implementation']} {x['predicted_us'] / own['predicted_us']:.2f}x" for x in able)


def _time(microseconds: float) -> str:
    return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.1f} us"


def budget(lines: list[dict[str, Any]]) -> str:
    """Return the budget file of a run: the cycles of each of our cases."""
    own = [x for x in lines if x["implementation"] == "pallas" and "error" not in x]
    entries = sorted(
        ({k: x[k] for k in ("kernel", "case", "chip", "cycles")} for x in own), key=lambda x: (*x.values(),)
    )
    body = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f'{{"libtpu": "{static_profile.LIBTPU}", "cycles": [\n{body}\n]}}\n'


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tpu-static", default=None, metavar="CHIPS", help=f"of {', '.join(chips.CHIPS)}")
    parser.add_argument("--gpu", action="store_true", help="check and time the cases on the GPU that is here")
    parser.add_argument("--check", action="store_true", help="with --gpu: check, and time nothing")
    parser.add_argument("--no-check", action="store_true", help="with --gpu: time, and check nothing")
    parser.add_argument("--tune", action="store_true", help="with --gpu: try every candidate's blocks too")
    parser.add_argument("--kernels", default=None, help="default: every kernel there is for the device")
    parser.add_argument("--cases", default=None, help="default: every timed case")
    parser.add_argument("--no-peers", action="store_true", help="our kernels alone")
    parser.add_argument("--out", type=Path, default=None, help="also write the lines to this file, and go on with it")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--table", type=Path, default=None, help="print the table of a file of lines")
    parser.add_argument("--budget", type=Path, default=None, help="make the budget of a file of lines")
    parser.add_argument(
        "--gpu-blocks", type=Path, default=None, help="make the tables of GPU blocks of a file of lines"
    )
    args = parser.parse_args(argv)
    if args.table or args.budget or args.gpu_blocks:
        if args.table:
            lines = [x for x in read(args.table) if args.cases is None or x.get("case") in args.cases.split(",")]
            print(gpu_bench.table(lines) if any("us" in x for x in lines) else table(lines))
        if args.budget:
            BUDGET.write_text(budget(read(args.budget)))
        if args.gpu_blocks:
            for name, text in gpu_bench.block_tables(read(args.gpu_blocks)).items():
                (tuning.FOLDER / name).write_text(text)
        return
    if args.tpu_static is None and not args.gpu:
        parser.error("nothing to do: --tpu-static CHIPS, --gpu, --table FILE, --budget FILE or --gpu-blocks FILE")
    there = ON_GPUS if args.gpu else KERNELS
    args.kernels = args.kernels or ",".join(there)
    for name, known in ((args.kernels, there), (args.tpu_static or "v5e", chips.CHIPS)):
        unknown = [x for x in name.split(",") if x not in known]
        if unknown:
            parser.error(f"{unknown[0]!r}: must be of {', '.join(known)}")
    if args.gpu:
        try:
            sys.exit(gpu_bench.main(args))
        except gpu_bench.NoGpu as error:
            parser.error(str(error))
    done = {tuple(line[k] for k in KEY) for line in read(args.out)} if args.out else set()
    cases = args.cases.split(",") if args.cases else None
    todo = jobs(args.kernels.split(","), args.tpu_static.split(","), cases, not args.no_peers)
    todo = [job for job in todo if tuple(job[k] for k in KEY) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        for line in tqdm(pool.map(measure, todo), total=len(todo), unit="case", disable=None):
            print(json.dumps(line), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
