"""The kernels for GPUs as they are compiled for an H100, run from their PTX on NumPy: cases, and whole programs."""

import json
import os
import subprocess
import sys

import pytest
from command import ROOT

from pallas_kernels import cuda_compiler
from pallas_kernels.kernels import ON_GPUS, kernel

# Of each kernel one or a few, of every kind of code that there is.
CASES = {
    "decode_attention": ["tree", "rows_of_80", "ring_cluster", "cluster_int8"],
    "quantized_matmul": ["int4_groups_128_bf16", "w4a8_offset", "many_int8_groups_64", "many_uint4_offset"],
    "paged_decode_attention": ["across_pages", "cluster_fp8"],
    "prefill_attention": ["odd_63"],
    "kivi_attention": ["gpu_splits", "cluster_8"],
    "kivi_prefill_attention": ["odd_63"],
    "paged_kivi_attention": ["page_32"],
    "rms_norm": ["wide"],
    "rope_append": ["ring_int8", "pages"],
    "kivi_pack": ["wrapped"],
    "paged_kivi_pack": ["rows"],
}


@pytest.fixture(scope="module")
def compiler():
    try:
        cuda_compiler.find()
    except RuntimeError:
        try:
            cuda_compiler.install()
        except RuntimeError as error:
            pytest.skip(f"jax's compiler for NVIDIA's GPUs is not to be had: {error}")


def output_of(*command: str) -> list[dict]:
    """Return the lines of a process that may compile for a GPU; those of tests would not be optimized as users' are."""
    hidden = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_cases_of_every_kernel_are_right(compiler):
    assert set(CASES) == set(ON_GPUS)
    names = sorted({name for cases in CASES.values() for name in cases})
    lines = output_of("-m", "pallas_kernels.aot_gpu", "--run", "1", "--cases", ",".join(names))
    found = {(line["kernel"], line["case"]) for line in lines if line.get("right")}
    assert found >= {(name, case) for name, cases in CASES.items() for case in cases}
    for name, case in found:
        assert case in {c.name for c in (*kernel(name).tests, *kernel(name).gpu_tests)}


def test_a_mistake_is_told_in_a_line(compiler):
    for arguments, said in (
        (["--kernels", "decode_attentio"], "--kernels decode_attentio: must be of decode_attention, "),
        (["--kernels", "rms_norm", "--cases", "bf1"], "--cases bf1: none of rms_norm has it; of them, alone, "),
        (["--run", "-1"], "--run -1: must be 1 or more orders"),
    ):
        command = [sys.executable, "-m", "pallas_kernels.aot_gpu", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_programs_decode_as_by_xla(compiler, tmp_path):
    """With caches, weights and drafts of every kind of step: prompts, one new token a row, and several."""
    expected = {
        "int8+kv_int4": {"kivi_attention", "kivi_prefill_attention", "quantized_matmul", "decode_attention"},
        "ngram:kv_paged:page=16": {"paged_decode_attention", "prefill_attention"},
    }
    for line in output_of("tests/gpu_program.py", str(tmp_path), *expected):
        assert line["tokens"] == line["expected"], line
        assert 0 < line["error"] < 0.03
        names = {name.removesuffix("_mosaic_gpu_kernel") for name in line["kernels"]}
        assert names >= expected[line["passes"]]
