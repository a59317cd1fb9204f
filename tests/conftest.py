"""How every test runs: on the CPU, with a compile cache that outlives the run, and the programs that tests share."""

import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxinfer-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Thousands of small programs, each run once or twice: what LLVM does for them costs ten times what it saves. Tests that
# compute for long are marked `optimized`. All as users run it: JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= pytest
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Since jaxlib 0.11 it knows no fusion emitters to switch off, and aborts on a flag that it does not know.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""),
)

import hypothesis
import jax
import pytest
from data import data_dir
from models import load_directory, random_program, tiny_config, tiny_moe

from jaxinfer.decode import costs
from jaxinfer.program import Program

hypothesis.settings.register_profile("jaxinfer", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("jaxinfer")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_do_not_pile_up():
    """Drop what was compiled before a worker runs out of memory mappings: Linux allows 65,530, then LLVM crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > 10_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def optimized(request):
    """Compile what runs for long as users do."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(autouse=True)
def given_costs(request, monkeypatch):
    """Give speculation the same costs on every machine, so that its widths are the same; a mark has them measured."""
    if request.node.get_closest_marker("measures_costs"):
        return

    def given(model, drafter, widths, batch, slots):
        return [1 + 0.05 * width for width in widths], [0.01 * width for width in widths]

    monkeypatch.setattr(costs, "_measure", given)
    monkeypatch.setattr(costs, "kept", lambda name, about, measure: measure())


@pytest.fixture(scope="session")
def stories() -> Program:
    """Return stories260K: a real trained Llama, small enough to have meaning and a second to run."""
    data = data_dir()
    if data is None or not (data / "models" / "stories260K").is_dir():
        pytest.skip("no models/stories260K in the data folder: set JAXINFER_DATA to the folder that has it")
    return load_directory(data / "models" / "stories260K")


@pytest.fixture(scope="session")
def tiny() -> Program:
    """Return a random program of two layers with a window in one, and no tokenizer."""
    return random_program(tiny_config())


@pytest.fixture(scope="session")
def tiny_experts() -> Program:
    """Return a random program with a mixture of experts in its second layer."""
    return random_program(tiny_config(moe=tiny_moe()))
