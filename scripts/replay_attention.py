"""tokamax's splash attention, whose times on a TPU 7x it ships, through the simulator: see `replay_measured.py`.

Some query heads of one row, a single one of 4096 tokens or more, are simulated with the blocks and layouts that were
measured, and counted as often as there are heads and rows. Around the kernel queries, keys, values and output are
transposed, which is in the measured time: by their bytes over the bandwidth. What differs from what was measured, see
`pallas_kernels/tokamax_splash.py`. Not replayed: what is timed with its residuals, too, and heads of 192 channels whose
values have 128.

What it is worth: of the 37 entries 18 can be replayed: predicted over measured time is 0.75 in the geometric mean, from
0.58 (512 tokens) to 0.91 (16384); it is 0.64 for rows of 512 tokens, 0.77 for 1024 and 0.85 for the six of 2048 and
more. Every prediction is too low, those of the shortest rows most. Nine, all with blocks of 2048 queries or more, do
not fit into VMEM as libtpu 0.0.52 compiles them, and it aborts on ten, all causal.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from pallas_kernels import chips, compat, static_profile, tokamax_splash

CHIP = "tpu7x"
DATA = f"tokamax/data/autotuning/{CHIP}/pallas_mosaic_tpu_flash_attention.json"


def entries(folder: Path) -> list[dict[str, Any]]:
    """Return the measured forward passes, those of the shortest rows first."""
    found = []
    for text, configs in json.loads((folder / DATA).read_text()).items():
        spec = json.loads(text)
        shapes = {x: [int(n) for n in re.findall(r"\d+", spec[x].split("[")[1])] for x in "qkv"}
        if spec["return_residuals"] or shapes["k"] != shapes["v"]:
            continue
        for config, timing in configs.items():
            measured = 1e3 * statistics.median(timing["evaluation_times_ms"])
            causal = spec["mask"]["is_causal"]
            found.append({**shapes, "causal": causal, "config": json.loads(config), "measured_us": measured})
    return sorted(found, key=lambda entry: entry["q"][1] * entry["k"][1])


def simulate(entry: dict[str, Any], dump: str) -> dict[str, Any]:
    """Return the line of an entry, simulated in this process."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    (B, T, N, H), (S, K) = entry["q"], entry["k"][1:3]
    heads = min(N, max(1, 4096 // T))
    chip = chips.CHIPS[CHIP]
    device = compat.topology_device(chip.topology)
    shapes = (heads, T, H), (max(1, heads * K // N), S, H)
    q, k = (jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device)) for shape in shapes)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return tokamax_splash.attend(q, k, v, causal=entry["causal"], config=entry["config"])

    with chips.assume(CHIP), compat.traced_for(device):
        compiled = jax.jit(attend).lower(q, k, k).compile()
    calls = set(re.findall(r"%(\S+) = .* custom_call_target=\"tpu_custom_call\"", compiled.as_text()))
    cycles = static_profile.read(Path(dump), calls)["cycles"]
    pairs = T * (T + 1) / 2 if entry["causal"] else T * S
    products = heads * 4 * pairs * H / (chip.clock * chip.flops_per_cycle)
    inside = max(cycles / chip.clock, products) * B * N / heads
    moved = 2 * 2 * B * H * (2 * T * N + 2 * S * K)  # bytes, read and written
    around = moved / chip.bandwidth
    line = {"cycles": cycles, "scaled": B * N / heads, "transposes_us": round(1e6 * around, 1)}
    return line | {"predicted_us": round(1e6 * (inside + around), 1)}
