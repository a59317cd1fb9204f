"""Which model runs on which TPU slice, planned without a TPU: the table of the README.

    python scripts/plan_matrix.py --out runs/matrix [--models A,B] [--passes bf16,int8,int4] [--topologies A,B]
    python scripts/plan_matrix.py --markdown --out runs/matrix

Each cell gets the mesh and batch (up to 64 rows for each copy of the model, of 8,192 tokens each) that predict the most
tokens a second and chip, and its decode step is compiled with libtpu; where that shows that it does not fit after all,
the next best ones are tried. Lines are written as they are done; a killed run goes on, and cells that are there are not
done again. A cell that does not fit or does not compile says why.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxinfer.errors import InputError
from jaxinfer.plan import choice, sweep
from jaxinfer.plan.request import Request
from jaxinfer.sharding.mesh import parse_mesh

MODELS = ("llama3-8b", "llama3-70b", "llama3-405b", "qwen3-30b-a3b", "qwen3-235b-a22b")
PASSES = {"bf16": (), "int8": ("int8",), "int4": ("int4", "kv_int8")}
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4")
NAMES = {"bf16": "bf16", "int8": "int8", "int4": "int4 + kv_int8"}
CONTEXT = 8192
TRIES = 3  # meshes of a cell that are compiled until one fits


def requests(models: list[str], passes: list[str], topologies: list[str], rows: list[sweep.Row]) -> list[Request]:
    """Return a request for each cell, cheapest to compile first; of what fits no mesh, one that says by how much.

    A cell of which a row is there that fits, or enough that don't, keeps its request: a search takes seconds.
    """
    found = []
    for name in passes:
        for model in models:
            for topology in topologies:
                asked = Request(
                    model=model, topology=topology, passes=PASSES[name], context=CONTEXT, phases=("decode",)
                )
                there = _of_cell(rows, model, name, topology)
                tried = [_request(row) for row in there]
                if there and (sweep.why_not(best_of(there)) is None or len(there) >= TRIES or not tried[0].mesh):
                    found.append(_request(best_of(there)))
                    continue
                print(f"mesh of {model} {name} {topology} ...", file=sys.stderr, flush=True)
                left = [request for request in choice.ranked(asked) if request not in tried]
                found.append([*left, *tried, asked][0])
    return found


def best_of(rows: list[sweep.Row]) -> sweep.Row:
    """Return the row of a cell that fits and predicts the most tokens; where none fits, the first that was tried."""
    able = [row for row in rows if sweep.why_not(row) is None]
    return max(able, key=lambda row: row["tokens_per_second_per_chip"]) if able else rows[0]


def _of_cell(rows: list[sweep.Row], model: str, name: str, topology: str) -> list[sweep.Row]:
    cell = {"model": model, "passes": list(PASSES[name]), "topology": topology}
    return [row for row in rows if {key: row["request"][key] for key in cell} == cell]


def markdown(rows: list[sweep.Row], models: list[str], passes: list[str], topologies: list[str]) -> str:
    """Return the table: a line a model and its passes, a column a slice."""
    out = ["| model | weights | " + " | ".join(topologies) + " |", "|---|---|" + "---|" * len(topologies)]
    for model in models:
        for name in passes:
            there = [_of_cell(rows, model, name, topology) for topology in topologies]
            cells = [_cell(best_of(found) if found else None) for found in there]
            out.append(f"| {model} | {NAMES[name]} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _request(row: sweep.Row) -> Request:
    """Return what a row was asked with."""
    return Request(**{name: tuple(x) if isinstance(x, list) else x for name, x in row["request"].items()})


def _cell(row: sweep.Row | None) -> str:
    if row is None:
        return "not run"
    if reason := sweep.why_not(row):
        return reason
    memory, decode = row["memory"], row["phases"]["decode"]
    ways = row["devices"] * decode["rows"] // row["batch"]
    sizes = {"model": ways} | parse_mesh(row["mesh"])
    mesh = ", ".join(f"{axis}={sizes[axis]}" for axis in ("stage", "model") if axis in sizes)
    rate, step = row["tokens_per_second_per_chip"], 1e3 * decode["times"]["step"]
    return f"{rate:.0f} tok/s, {step:.1f} ms, {memory['total'] / 1e9:.1f} GB; {mesh}, batch {row['batch']}"


def main(argv: list[str] | None = None) -> None:
    """Plan the cells that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--passes", default=",".join(PASSES))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--shapes-only", action="store_true", help="compile nothing: estimates")
    parser.add_argument("--markdown", action="store_true", help="only print the table of what --out has")
    args = parser.parse_args(argv)
    chosen = [text.split(",") for text in (args.models, args.passes, args.topologies)]
    if unknown := set(chosen[1]) - set(PASSES):
        parser.error(f"--passes: no {min(unknown)!r}: must be of {', '.join(PASSES)}")
    try:
        if not args.markdown:
            fill(args.out, *chosen, compiling=not args.shapes_only)
        print(markdown(sweep.rows_of(args.out), *chosen))
    except InputError as error:
        parser.error(str(error))


def fill(out: Path, *chosen: list[str], compiling: bool) -> None:
    """Plan the cells that are missing."""
    from tqdm import tqdm

    out.mkdir(parents=True, exist_ok=True)
    for _ in range(TRIES):
        sweep.run(requests(*chosen, sweep.rows_of(out)), out, compiling, wrap=lambda left: tqdm(left, unit="cell"))


if __name__ == "__main__":
    main()
