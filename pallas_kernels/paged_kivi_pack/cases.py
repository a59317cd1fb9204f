"""What packing into pages is tested and timed on."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.case import Case, Kernel
from pallas_kernels.kivi_pack import cases as of_rows
from pallas_kernels.paged_kivi_pack import gpu, reference

NAMES = ("codes", "key_grids", "value_grids")


def case(
    name: str, start: list[int], counts: list[int], page: int, *, group: int, pages: int = 2, **sizes: Any
) -> Case:
    """Return a case of rows whose pages are anywhere, some of `kivi_pack` otherwise."""
    each, B = page // group, len(start)
    found = of_rows.case(name, start, counts, group=group, M=pages * each, **sizes)
    shapes, P = dict(found.shapes), B * pages + 2
    codes, scale, lines = (shapes[x].shape for x in ("k_codes", "k_scale", "v_scale"))
    for x in of_rows.NAMES:
        del shapes[x]
    table = np.random.default_rng(5).permutation(P)[: B * pages].astype(np.int32).reshape(B, pages)
    # What a row has not reached yet is in no page.
    reached = np.arange(pages) * page < (np.array(start) + counts)[:, None]
    shapes["table"] = np.where(reached, table, 10**6).astype(np.int32)
    shapes["codes"] = jax.ShapeDtypeStruct((P, 2, codes[1], page // 2, codes[3]), jnp.uint8)
    shapes["key_grids"] = jax.ShapeDtypeStruct((P, 2, scale[1], each, scale[3]), jnp.bfloat16)
    shapes["value_grids"] = jax.ShapeDtypeStruct((P, 2, lines[1], page), jnp.bfloat16)
    return dataclasses.replace(found, shapes=shapes, donated=NAMES, spoil=found.spoil and _spoil)


def _spoil(inputs: dict[str, Any]) -> dict[str, Any]:
    """Fill the slots of rings with NaN that have no token of the group which new tokens begin in."""
    return of_rows.spoil(inputs, inputs["value_grids"].shape[3] // inputs["key_grids"].shape[3])


TESTS = [
    case("rows", [31, 30, 64, 95, 127, 128, 10], [1, 1, 32, 1, 1, 32, 0], 64, group=32),
    case("page_of_one", [63, 120], [1, 8], 64, group=64, H=64),
    case("page_of_four", [223, 100], [1, 28], 128, group=32, H=256, K=1),
    case("group_128", [255, 500, 126], [1, 12, 1], 256, group=128),
]
TIMED = [
    case("b1_p64", [4095], [1], 64, group=32, K=8, pages=64, R=128, spoiled=False),
    case("b64_p64", [4095 - i % 32 for i in range(64)], [1] * 64, 64, group=32, K=8, pages=64, R=128, spoiled=False),
]


KERNEL = Kernel("paged_kivi_pack", None, reference, TESTS, TIMED, None, None, gpu=gpu, gpu_peers={"xla": reference})
