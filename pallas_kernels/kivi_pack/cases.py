"""What packing is tested and timed on."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.kivi_attention.cases import packed
from pallas_kernels.kivi_pack import gpu, reference

BF16 = jnp.bfloat16
NAMES = ("k_codes", "k_scale", "k_offset", "v_codes", "v_scale", "v_offset")


def case(
    name: str, start: Sequence[int], counts: Sequence[int], *, group: int, K: int = 2, H: int = 128, M: int = 4,
    R: int | None = None, spoiled: bool = True,
) -> Case:  # fmt: skip
    """Return a case of rows with new tokens, in rings of R slots and M groups a row."""
    B, R = len(start), R or 3 * group
    ring = jax.ShapeDtypeStruct((B, K, R, H), BF16)
    runs = H // group if H % group == 0 else 1
    shapes = {"k": ring, "v": ring, "start": np.array(start, np.int32), "counts": np.array(counts, np.int32)}
    groups = packed(B, 1, K, 1, M * group, H, group=group, runs=runs, dtype=BF16, grid=BF16)
    shapes |= {x: groups[x] for x in NAMES}
    done = [s // group < min(M, (s + n) // group) for s, n in zip(start, counts, strict=True)]
    numbers = 2 * K * group * H
    moved = sum(done) * (2.5 * numbers + 4 * K * (H + group * runs)) + 8 * B
    return Case(
        name, shapes, {"group": group}, flops=4.0 * sum(done) * numbers, bytes=float(moved), donated=NAMES,
        spoil=_spoil if spoiled else None,
    )  # fmt: skip


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    return spoil(inputs, inputs["v_scale"].shape[2] // inputs["k_scale"].shape[2])


def spoil(inputs: dict[str, Any], group: int) -> dict[str, Any]:
    """Fill the slots of rings with NaN that have no token of the group which new tokens begin in."""
    R = inputs["k"].shape[2]
    first = inputs["start"][:, None] // group * group
    dead = (np.arange(R) - first) % R >= group
    return inputs | {x: jnp.where(dead[:, None, :, None], jnp.nan, inputs[x]) for x in "kv"}


# Groups that the first, the last, one or all of their tokens complete, groups that none do, and no room for one.
TESTS = [
    case("one_row", [63], [1], group=32, M=2),
    case("rows", [31, 30, 64, 95, 127, 128, 10], [1, 1, 32, 1, 1, 32, 0], group=32),
    case("wrapped", [90, 60, 120], [6, 31, 8], group=32, R=96),
    case("h64", [95, 33, 60], [1, 30, 5], group=32, K=3, H=64),
    case("one_head_of_64", [31], [1], group=32, K=1, H=64),
    case("h256", [64, 31], [32, 1], group=32, K=1, H=256),
    case("group_64", [63, 100, 190], [1, 3, 2], group=64, M=3),
    case("group_64_h64", [120, 64], [8, 64], group=64, H=64),
    case("group_64_h256", [127], [1], group=64, H=256),
    case("group_128", [255, 126], [1, 8], group=128),
    case("group_128_h64", [127, 383], [1, 1], group=128, H=64, K=3),
    case("group_128_h256", [500], [12], group=128, H=256),
]
TIMED = [
    case("b1", [4095], [1], group=32, K=8, M=256, R=128, spoiled=False),
    case("b1_none", [4094], [1], group=32, K=8, M=256, R=128, spoiled=False),
    case("b64", [4095] * 64, [1] * 64, group=32, K=8, M=256, R=128, spoiled=False),
    case("b64_two", [4095 - i % 32 for i in range(64)], [1] * 64, group=32, K=8, M=256, R=128, spoiled=False),
    case("b1_group_128", [4095], [1], group=128, K=8, M=64, R=384, spoiled=False),
]


KERNEL = Kernel("kivi_pack", None, reference, TESTS, TIMED, None, None, gpu=gpu, gpu_peers={"xla": reference})
