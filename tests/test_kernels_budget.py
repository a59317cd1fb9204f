"""No kernel gets slower than it was: the simulated cycles of every timed case against the committed budget."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from tpu import LIBTPU, needs_libtpu

from pallas_kernels import static_profile
from pallas_kernels.kernels import KERNELS, kernel

BUDGET = json.loads((Path(static_profile.__file__).parent / "budget.json").read_text())
SLOWER = 1.05  # the simulation is exact: the same program takes the same cycles


def of(name, chip):
    return {e["case"]: e["cycles"] for e in BUDGET["cycles"] if (e["kernel"], e["chip"]) == (name, chip)}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_timed_case_has_a_budget(name, chip):
    assert set(of(name, chip)) == {case.name for case in kernel(name).timed}


@needs_libtpu
@pytest.mark.skipif(
    LIBTPU and importlib.metadata.version("libtpu") != BUDGET["libtpu"],
    reason=f"the budget is of libtpu {BUDGET['libtpu']}: each version of its compiler has cycles of its own",
)
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", KERNELS)
def test_cycles_stay_within_the_budget(name, chip):
    budget = of(name, chip)
    lines = static_profile.profiles(name, list(budget), chip, timeout=1800)
    assert not [line for line in lines if "error" in line]
    slower = {x["case"]: (x["cycles"], budget[x["case"]]) for x in lines if x["cycles"] > SLOWER * budget[x["case"]]}
    assert not slower, "cycles now, and the budget; `scripts/bench_kernels.py --budget` writes a new one"
