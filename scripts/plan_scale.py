"""Where each strategy stops scaling, up to 16,384 chips, by the cost model; and that model against compiled programs.

    python scripts/plan_scale.py --out runs/scale [--model llama3-70b] [--kind v5p] [--batch 8192]
    python scripts/plan_scale.py --check runs/matrix

The same batch on ever more chips: a table, and scale.png. --check compares the model's collectives and memory with
those of the programs that scripts/plan_matrix.py compiled, cell by cell.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxinfer.plan import scaling, sweep
from jaxinfer.plan.planning import plan
from jaxinfer.plan.request import Request

CHIPS = (64, 256, 1024, 4096, 16_384)
DENSE = {
    "model=4": {"model": 4},
    "model=16": {"model": 16},
    "model=64": {"model": 64},
    "stage=4,model=16": {"stage": 4, "model": 16},
}
EXPERTS = {"expert=8": {"expert": 8}, "expert=32": {"expert": 32}, "expert=16,model=4": {"expert": 16, "model": 4}}


def check(rows: list[sweep.Row]) -> None:
    """Print what the model says of each compiled cell beside what the compiler says."""
    print("| cell | collectives, MB: compiled | model | ratio | weights, GB: compiled | model | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        if "error" in row or row["phases"]["decode"]["compiled"] is None:
            continue
        asked = row["request"]
        request = Request(**{**asked, "passes": tuple(asked["passes"]), "phases": tuple(asked["phases"])})
        guess = plan(request, compiling=False)
        theirs = sum(c["count"] * c["bytes"] for c in row["phases"]["decode"]["collectives"]) / 1e6
        ours = sum(n * c.bytes for c, n in guess.phases["decode"].collectives.items()) / 1e6
        weights, model = row["memory"]["weights"] / 1e9, guess.memory.weights / 1e9
        name = f"{asked['model']} {'+'.join(asked['passes']) or 'bf16'} {asked['topology']} {asked['mesh']}"
        share = f"{ours / theirs:.2f}" if theirs else ""
        print(f"| {name} | {theirs:.2f} | {ours:.2f} | {share} | {weights:.3f} | {model:.3f} | {model / weights:.3f} |")


def main(argv: list[str] | None = None) -> None:
    """Print the table, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--check", type=Path, default=None, help="what plan_matrix.py wrote")
    parser.add_argument("--model", default="llama3-70b")
    parser.add_argument("--kind", default="v5p", choices=list(scaling.SLICES))
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--context", type=int, default=8192)
    args = parser.parse_args(argv)
    if args.check is not None:
        check(sweep.rows_of(args.check))
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    request = Request(model=args.model, topology="", passes=("int8", "kv_int8"), batch=args.batch, context=args.context)
    strategies = EXPERTS if "qwen3" in args.model else DENSE
    points = scaling.scale(request, args.kind, strategies, CHIPS)
    print(
        "| strategy | chips | mesh of a slice | ms/token | network | tokens/s per chip |\n|---|---:|---|---:|---:|---:|"
    )
    for p in points:
        numbers = f"{1e3 * p.step:.2f} | {p.network:.0%} | {p.rate:.1f}" if p.step else f"{p.why} | | "
        slices = f"{p.slices} x " if p.slices > 1 else ""
        print(f"| {p.strategy} | {p.chips:,} | {slices}{p.mesh} | {numbers} |")
    for name, chips in scaling.stops(points).items():
        told = f"half of its best tokens/s per chip or more up to {chips:,} chips" if chips else "nowhere"
        print(f"{name}: {told}")
    about = f"{args.batch:,} rows of {args.context:,} tokens on {args.kind}"
    title = f"{args.model}, int8 weights and cache, {about}: the cost model, no device"
    scaling.plot(points, args.out / "scale.png", title)


if __name__ == "__main__":
    main()
