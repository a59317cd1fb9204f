"""No kernel gets slower than it was: the simulated cycles of every timed case against the committed budget."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
from tpu import LIBTPU, needs_libtpu

from pallas_kernels import aot, static_profile
from pallas_kernels.kernels import KERNELS, kernel

BUDGET = json.loads((Path(static_profile.__file__).parent / "budget.json").read_text())
of_this_libtpu = pytest.mark.skipif(
    LIBTPU and importlib.metadata.version("libtpu") != BUDGET["libtpu"],
    reason=f"the budget is of libtpu {BUDGET['libtpu']}: each version of its compiler has cycles of its own",
)
SLOWER = 1.05  # the simulation is exact: the same program takes the same cycles


def of(name, chip):
    return {e["case"]: e["cycles"] for e in BUDGET["cycles"] if (e["kernel"], e["chip"]) == (name, chip)}


def only_cycles(dump):
    """Return an environment that profiles without dumps: they are a third of the time, and no cycle is read of them."""
    flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_static_llo_profile_to={dump}"
    return {**aot.environment(), "LIBTPU_INIT_ARGS": flags}


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", KERNELS)
def test_every_timed_case_has_a_budget(name, chip):
    assert set(of(name, chip)) == {case.name for case in kernel(name).timed}


@needs_libtpu
@of_this_libtpu
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize("name", KERNELS)
def test_cycles_stay_within_the_budget(name, chip, monkeypatch):
    monkeypatch.setattr(static_profile, "environment", only_cycles)
    budget = of(name, chip)
    lines = static_profile.profiles(name, list(budget), chip, timeout=1800)
    assert not [line for line in lines if "error" in line]
    assert [line["case"] for line in lines] == list(budget)
    slower = {x["case"]: (x["cycles"], budget[x["case"]]) for x in lines if x["cycles"] > SLOWER * budget[x["case"]]}
    assert not slower, "cycles now, and the budget; `scripts/bench_kernels.py --budget` writes a new one"


@needs_libtpu
@of_this_libtpu
def test_the_dumps_change_no_cycles(monkeypatch):
    """The budget is written with them, and read without."""
    case = ("quantized_matmul", "w8a8_m8_o4096", "v5e")
    line = static_profile.profile(*case)
    monkeypatch.setattr(static_profile, "environment", only_cycles)
    assert line["cycles"] == static_profile.profile(*case)["cycles"]
    assert line["bundles"] > 0 and line["critical_path"]
