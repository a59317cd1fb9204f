"""`jaxinfer plan --sweep`: every combination of what is given several times."""

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

from jaxinfer.errors import InputError


def run(args: argparse.Namespace) -> None:
    """Plan every combination, print the table and draw the picture."""
    from tqdm import tqdm

    from jaxinfer.plan import sweep, table
    from jaxinfer.plan.request import Request

    if args.out is None:
        raise InputError("no --out: a sweep writes its rows to a folder; give --out DIR")
    if args.json:
        raise InputError("--json: a sweep writes JSON lines to --out; leave it out")
    prices = _prices(args)

    def bar(left: list[Request]):
        return tqdm(left, desc="plans", unit="plan", file=sys.stderr, disable=not sys.stderr.isatty())

    rows = sweep.run(requests(args), args.out, compiling=not args.shapes_only, wrap=bar)
    print(table.terminal(rows, prices))
    path = Path(args.out) / table.PICTURE
    drawn = table.plot(rows, prices, path)
    picture = f" and {path}" if drawn else "; nothing to draw: no setting fits and has a predicted time"
    print(f"{path.parent / sweep.NAME}{picture}", file=sys.stderr)


def requests(args: argparse.Namespace) -> list:
    """Return the requests of every topology, mesh, batch and variant."""
    from jaxinfer.cli.compare import read_pass_set
    from jaxinfer.cli.plan import base_request
    from jaxinfer.plan.speculation import parse_decoder

    parse_decoder(args.decoder)
    base = base_request(args)
    variants = [variant.passes for variant in read_pass_set(args.pass_set)] if args.pass_set else [()]
    return [
        dataclasses.replace(base, topology=topology, mesh=mesh, batch=batch, passes=(*base.passes, *passes))
        for topology, mesh, batch, passes in itertools.product(
            args.topology, args.mesh or [""], args.batch or [1], variants
        )
    ]


def _prices(args: argparse.Namespace) -> dict[str, float]:
    prices = {}
    for text in args.price or ():
        kind, _, dollars = text.partition("=")
        try:
            prices[kind] = float(dollars)
        except ValueError:
            prices[kind] = -1.0
        if prices[kind] <= 0:
            raise InputError(f"--price {text}: must be KIND=DOLLARS a chip and hour, such as v5e=1.2")
    missing = {name.partition(":")[0] for name in args.topology} - set(prices)
    if prices and missing:
        raise InputError(f"--price: none for {', '.join(sorted(missing))}; give each kind one, or none at all")
    return prices
