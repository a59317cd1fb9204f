"""Every kernel compiles for every TPU, alone and under shard_map, and programs for a TPU hold the kernels."""

import pytest
from tpu import lines, needs_libtpu
from tpu_programs import LOOPS

from pallas_kernels.chips import CHIPS
from pallas_kernels.kernels import KERNELS, kernel

# All chips are compiled for in one process: much of what JAX traces for the first it keeps for the others.
pytestmark = needs_libtpu


@pytest.mark.parametrize("chip", CHIPS)
def test_every_case_compiles_alone(chip):
    found = [line for line in lines("-m", "pallas_kernels.aot") if line["chip"] == chip]
    assert not [line for line in found if "error" in line]
    assert {(line["kernel"], line["case"]) for line in found} == {
        (name, case.name) for name in KERNELS for case in kernel(name).tests
    }
    assert all(line["calls"] == 1 for line in found)
    # What a call changes in place is aliased: keys and values, and their scales.
    changed = {line["case"]: line["aliased"] for line in found if line["kernel"] == "paged_decode_attention"}
    assert changed.pop("read_only") == 0
    assert changed.pop("int8") == changed.pop("fp8") == 4 and set(changed.values()) == {2}


@pytest.mark.parametrize("chip", CHIPS)
def test_under_shard_map_on_four_devices(chip):
    cases = ",".join(case.name for name in KERNELS for case in kernel(name).tests if case.races)
    found = [line for line in lines("-m", "pallas_kernels.aot", "--mesh", "--cases", cases) if line["chip"] == chip]
    assert len(found) > len(KERNELS) and not [line for line in found if "error" in line]
    assert all(line["calls"] == 1 and line["devices"] == 4 for line in found)


@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        ("decode", {"decode_attention": 2}),
        ("decode_float32", {"decode_attention": 2}),
        ("prefill", {"prefill_attention": 2}),
        ("decode_kv_int8", {"decode_attention": 2}),
        ("decode_kv_fp8", {"decode_attention": 2}),
        ("decode_kv_int4", {"kivi_attention": 2}),
        ("verify_kv_int4", {"kivi_attention": 2}),
        ("prefill_kv_int4", {"kivi_prefill_attention": 2}),
        ("decode_kv_paged", {"paged_decode_attention": 2}),
        ("decode_kv_paged_int4", {"paged_kivi_attention": 2}),
        ("verify_kv_paged_int4", {"paged_kivi_attention": 2}),
        ("prefill_kv_paged_int4", {"kivi_prefill_attention": 2}),
        ("decode_kv_int4_of_32", {}),
        ("prefill_kv_int8", {"prefill_attention": 2}),
        ("decode_int8", {"decode_attention": 2, "quantized_matmul": 15}),
        ("decode_int4", {"decode_attention": 2, "quantized_matmul": 15}),
        ("decode_w8a8", {"decode_attention": 2, "quantized_matmul": 15}),
        ("xla", {}),
    ],
)
def test_a_program_for_a_tpu_holds_the_kernels(program, kernels):
    found = {line["program"]: line["kernels"] for line in lines("tests/tpu_programs.py") if "kernels" in line}
    assert found[program] == kernels


def test_a_decode_loop_for_a_tpu_does_not_copy_its_cache():
    found = {line["program"]: line["copies"] for line in lines("tests/tpu_programs.py") if "copies" in line}
    assert found == {f"loop_{kind}_{at}": [] for kind in LOOPS for at in ("1_1", "4_1", "4_4")}
