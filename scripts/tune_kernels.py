"""Find the fastest blocks of every timed case by static cycles, with no TPU, and write the tables that kernels read.

    python scripts/tune_kernels.py [--kernels decode_attention,...] [--chips v5e,v6e] [--cases NAME,...] [--jobs 2]

Needs libtpu (`pip install -e ".[tpu]"`). Every candidate is compiled and simulated in a process of its own; a line of
JSON is printed for each, and the best of a case goes into `pallas_kernels/blocks/KERNEL.json` at once: a run that was
stopped goes on with the cases that are missing (--again: with all).
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pallas_kernels import chips, static_profile, tuning
from pallas_kernels.kernels import KERNELS, kernel


def tune(name: str, case_name: str, chip: str, jobs: int) -> dict[str, Any] | None:
    """Return the table's entry for a case: the candidate with the shortest predicted time, then the fewest cycles."""
    found = kernel(name)
    case = next(c for c in found.timed if c.name == case_name)
    candidates = list(found.candidates(case, chip))

    def measure(blocks: dict[str, int]) -> dict[str, Any]:
        line = static_profile.profile(name, case_name, chip, blocks=blocks, timeout=300)
        print(json.dumps(line | {"blocks": blocks}), flush=True)
        return line

    with ThreadPoolExecutor(jobs) as pool:
        lines = list(pool.map(measure, candidates))
    ranked = [(line["predicted_us"], line["cycles"], i) for i, line in enumerate(lines) if "error" not in line]
    if not ranked:
        return None
    best = min(ranked)[2]
    return {
        "chip": chip,
        "case": case_name,
        "class": found.shape_class(**case.shapes, **case.options),
        "blocks": candidates[best],
        "cycles": lines[best]["cycles"],
    }


def save(name: str, entries: list[dict[str, Any]]) -> None:
    """Write a kernel's table, an entry a line."""
    tuning.FOLDER.mkdir(exist_ok=True)
    ordered = sorted(entries, key=lambda e: (e["chip"], e["case"]))
    lines = ",\n".join(json.dumps(entry) for entry in ordered)
    (tuning.FOLDER / f"{name}.json").write_text(f"[\n{lines}\n]\n")
    tuning.table.cache_clear()


def main(argv: list[str] | None = None) -> None:
    """Tune what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--chips", default="v5e,v6e", help=f"of {', '.join(chips.CHIPS)}")
    parser.add_argument("--cases", default=None, help="default: every timed case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="tune what the table already has, too")
    args = parser.parse_args(argv)
    for name in args.kernels.split(","):
        names = args.cases.split(",") if args.cases else [c.name for c in kernel(name).timed]
        for chip in args.chips.split(","):
            for case in names:
                entries = tuning.table(name)
                if not args.again and any(e["chip"] == chip and e["case"] == case for e in entries):
                    continue
                entry = tune(name, case, chip, args.jobs)
                if entry is None:
                    print(f"{name} {case} {chip}: no candidate could be profiled", file=sys.stderr)
                    continue
                others = [e for e in entries if (e["chip"], e["case"]) != (chip, case)]
                save(name, [*others, entry])


if __name__ == "__main__":
    main()
