"""Every TPU kernel against its reference by the plain interpreter; what it refuses; and how exact it has to be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from kernel_cases import ALL, case_of, check

from jaxinfer.ops.attention import attention
from pallas_kernels import calls, chips, decode_attention, prefill_attention, quantized_matmul, tuning
from pallas_kernels.decode_attention.cases import case as decode_case
from pallas_kernels.kernels import KERNELS, kernel
from pallas_kernels.paged_decode_attention.cases import case as paged_case
from pallas_kernels.prefill_attention.cases import case as prefill_case
from pallas_kernels.quantized_matmul import tpu_plan
from pallas_kernels.tolerance import BOUNDS, relative_error


@pytest.mark.parametrize(("name", "case"), ALL)
def test_a_kernel_is_its_reference(name, case):
    check(*case_of(name, case), interpret=True)


@pytest.mark.parametrize("name", KERNELS)
def test_scalars_that_are_known_change_nothing(name):
    """A static profile has them written into the kernel."""
    found = kernel(name)
    cases = [c for c in found.tests if any(getattr(x, "dtype", None) == np.int32 for x in c.shapes.values())][:3]
    for case in cases:
        check(found, case, interpret=True, known=True)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_cases_a_table_and_a_reference_that_tells_inputs_apart(name):
    found = kernel(name)
    assert len({c.name for c in [*found.tests, *found.timed]}) == len(found.tests) + len(found.timed)
    tuned = {(entry["chip"], entry["case"]) for entry in tuning.table(name)}
    whole = {(chip, case.name) for chip in ("v5e", "v6e") for case in found.timed}
    # The simulator can't tell all of the other chips' cases; what has no entry of its own class takes another's.
    assert whole <= tuned <= whole | {(chip, case.name) for chip in ("v5p", "tpu7x") for case in found.timed}
    for entry in tuning.table(name):  # a case is run with the blocks that were found for it
        assert tuning.blocks(name, entry["chip"], entry["class"]) == entry["blocks"]
        case = next(c for c in found.timed if c.name == entry["case"])
        assert found.shape_class(**case.shapes, **case.options) == entry["class"]
    case = found.tests[0]
    inputs = [jax.tree.map(jnp.asarray, case.inputs(seed)) for seed in (0, 1)]
    one, other = (np.asarray(_first(found.reference(**x, **case.options)), np.float32) for x in inputs)
    assert relative_error(one, other) > 0.1


def _first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


ROWS = dict(
    T=st.integers(1, 8),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 2, 3, 4, 8]),
    H=st.sampled_from([16, 60, 63, 64, 80, 96, 128]),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    softcap=st.sampled_from([None, 3.0]),
)


@settings(max_examples=15, deadline=None)
@given(S=st.sampled_from([60, 63, 96, 192, 200]), window=st.sampled_from([None, 1, 17, 300]), sinks=st.integers(0, 3),
       block=st.sampled_from([32, 64, 200]), splits=st.integers(1, 2), **ROWS)  # fmt: skip
def test_decode_attention_at_any_size(S, window, sinks, block, splits, lengths, **shape):
    lengths = [min(n, S) for n in lengths]
    if block < S and S % 32:
        S = 192
    blocks = {"slots": block if S % block == 0 else 32, "heads": 2, "buffers": 2, "splits": splits}
    if S % blocks["slots"]:
        blocks["slots"] = S
    options = dict(window=window, sinks=sinks if window else 0, softcap=shape.pop("softcap"), return_lse=True)
    case = decode_case("any", len(lengths), S=S, length=lengths, dtype=jnp.float32, blocks=blocks, **shape, **options)
    check(kernel("decode_attention"), case, interpret=True)


@settings(max_examples=10, deadline=None)
@given(page=st.sampled_from([8, 16, 24]), pages=st.integers(1, 4), append=st.booleans(), **ROWS)
def test_paged_decode_attention_at_any_size(page, pages, append, lengths, **shape):
    lengths = [n if n == 0 else max(n, shape["T"]) for n in lengths]
    softcap, blocks = shape.pop("softcap"), {"slots": pages * page, "buffers": 2}
    most = max(1, -(-max(lengths) // page))
    case = paged_case(
        "any", len(lengths), page=page, length=lengths, dtype=jnp.float32, append=append, most=most, blocks=blocks,
        softcap=softcap, **shape,
    )  # fmt: skip
    check(kernel("paged_decode_attention"), case, interpret=True)


@settings(max_examples=12, deadline=None)
@given(T=st.sampled_from([9, 60, 63, 130]), past=st.sampled_from([0, 1, 100]), K=st.integers(1, 2),
       G=st.sampled_from([1, 2, 3, 4, 8]), H=st.sampled_from([16, 60, 63, 64, 80, 128]),
       window=st.sampled_from([None, 1, 17, 300]), sinks=st.integers(0, 3), softcap=st.sampled_from([None, 3.0]),
       queries=st.sampled_from([16, 32, 64]), rows=st.sampled_from([16, 32, 128]))  # fmt: skip
def test_prefill_attention_at_any_size(T, past, K, G, H, window, sinks, softcap, queries, rows):
    lengths = [past + T, max(0, past + T - 7)]
    options = dict(window=window, sinks=sinks if window else 0, softcap=softcap, return_lse=True)
    blocks = {"queries": queries, "slots": 128, "rows": rows, "buffers": 2}
    case = prefill_case(
        "any", 2, T, K, G, 256, H, dtype=jnp.float32, position=[past, past], length=lengths, blocks=blocks, **options
    )
    check(kernel("prefill_attention"), case, interpret=True)


def test_the_bounds_are_four_times_what_xla_is_off_by():
    for dtype, bound in BOUNDS.items():
        worst = 0.0
        for case in kernel("decode_attention").tests:
            if {"tree", "sinks"} & set(case.options) or {"start", "k_scale"} & set(case.shapes):
                continue
            inputs = case.inputs()
            position = inputs.pop("position", inputs["length"] - inputs["q"].shape[1])
            positions = position[:, None] + np.arange(inputs["q"].shape[1])
            if (positions < 0).any():
                continue
            floats = {name: inputs[name].astype(dtype) for name in "qkv"}
            options = {k: v for k, v in case.options.items() if k != "return_lse"}
            found = attention(**floats, positions=jnp.asarray(positions, jnp.int32), **options)
            expected = decode_attention.reference(**floats, length=inputs["length"], position=position, **options)
            worst = max(worst, relative_error(found, expected))
        assert 2 * worst < bound < 6 * worst, (dtype, worst)


def test_blocks_too_large_for_vmem_are_told_before_the_compiler_sees_them():
    case = kernel("decode_attention").timed[0]
    blocks = {"slots": 4096, "heads": 8, "buffers": 4, "splits": 1}
    with chips.assume("v5p"), pytest.raises(ValueError, match=r"decode_attention: .* need 6\d\.\d MiB .* 48 MiB"):
        decode_attention.tpu(**case.inputs(), **case.options, blocks=blocks)


@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
@pytest.mark.parametrize("inputs", [8192, 28672])
def test_tuned_blocks_are_cut_for_wide_weights_on_chips_with_little_vmem(chip, inputs):
    struct = jax.ShapeDtypeStruct
    shapes = struct((64, inputs), jnp.bfloat16), struct((14336, inputs), jnp.int8), struct((1, 14336), jnp.float32)
    with chips.assume(chip):
        product = functools.partial(quantized_matmul.tpu, qtype="int8")
        assert jax.eval_shape(product, *shapes).shape == (64, 14336)
        tuned = dict(rows=64, outputs=512, copies=4, lanes=128)
        with pytest.raises(ValueError, match="take smaller blocks"):  # blocks that are named are left as they are
            jax.eval_shape(functools.partial(product, blocks=tuned), *shapes)


@pytest.mark.parametrize(
    ("inputs", "group", "cut"),
    [
        (4096, 64, dict(rows=64, outputs=256, copies=4)),  # as tuned
        (16_384, 64, dict(rows=64, outputs=128, copies=4)),
        (26_624, 32, dict(rows=32, outputs=128, copies=2)),
        (53_248, 32, dict(rows=16, outputs=128, copies=1)),
    ],
)
def test_what_x_and_its_parts_take_is_left_to_them_before_blocks_are_fitted(inputs, group, cut):
    struct, chip, plans = jax.ShapeDtypeStruct, chips.CHIPS["v5p"], []
    shapes = struct((64, inputs), jnp.bfloat16), struct((4608, inputs // 2), jnp.uint8)
    shapes += (struct((inputs // group, 4608), jnp.bfloat16),)
    tuned = tuning.blocks("quantized_matmul", "v5p", kernel("quantized_matmul").shape_class(*shapes, qtype="int4"))

    def product(x, values, scale):
        plans.append(tpu_plan.fitting(x, values, scale, None, "int4", None, tuned, chip))
        return quantized_matmul.tpu(x, values, scale, qtype="int4")

    with chips.assume("v5p"):
        assert jax.eval_shape(product, *shapes).shape == (64, 4608)
    assert {name: getattr(plans[0], name) for name in cut} == cut


def test_outputs_that_are_too_wide_for_any_blocks_are_refused():
    struct = jax.ShapeDtypeStruct
    shapes = struct((64, 131_072), jnp.bfloat16), struct((128, 131_072), jnp.int8), struct((1, 128), jnp.float32)
    why = "131072 inputs need 76.0 MiB of VMEM for 8 rows and 128 outputs, and v5p gives a kernel 48 MiB; divide them"
    with chips.assume("v5p"), pytest.raises(NotImplementedError, match=why):
        jax.eval_shape(functools.partial(quantized_matmul.tpu, qtype="int8"), *shapes)


def test_a_kernel_says_what_it_can_not_do():
    q, k = jnp.zeros((1, 1, 1, 64)), jnp.zeros((1, 1, 72, 64))
    length = jnp.array([3])
    blocks = {"slots": 32, "heads": 1, "buffers": 2, "splits": 1}
    with pytest.raises(NotImplementedError, match="72 cache slots: must be a multiple of"):
        decode_attention.tpu(q, k, k, length, scale=1.0, blocks=blocks)
    with pytest.raises(NotImplementedError, match="sinks=40: more than the 36 slots"):
        decode_attention.tpu(
            q, k[:, :, :36], k[:, :, :36], length, scale=1.0, window=4, sinks=40, blocks=blocks | {"slots": 36}
        )
    with pytest.raises(ValueError, match="position and tree"):
        decode_attention.tpu(q, k, k, length, scale=1.0, position=length, tree=jnp.ones((1, 1), bool))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(starts=np.array([[0, 9]]), position=np.array([1])), ValueError, "S=128 must be T=130, with no position"),
        (dict(sinks=2), ValueError, "sinks=2: they are what is seen beyond a window"),
        (dict(counts=np.ones((1, 1, 2), int)), ValueError, "counts, lists and sparse_block: all or none"),
        (dict(k_scale=jnp.ones((1, 1, 128))), ValueError, "k_scale and v_scale: both or none"),
        (dict(sparse_block=(8, 128)), NotImplementedError, r"sparse_block=\(8, 128\): must be multiples of 16"),
        (dict(sparse_block=(16, 128)), ValueError, r"lists \(1, 1, 2, 1\): must be"),
    ],
)
def test_prefill_attention_says_what_it_can_not_do(options, error, message):
    q, k = jnp.zeros((1, 130, 1, 64)), jnp.zeros((1, 1, 128, 64))
    if "sparse_block" in options:
        options = options | dict(counts=np.ones((1, 1, 2), np.int32), lists=np.zeros((1, 1, 2, 1), np.int32))
    with pytest.raises(error, match=message):
        prefill_attention.tpu(q, k, k, scale=1.0, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(qtype="int3"), NotImplementedError, "qtype='int3': must be one of"),
        (dict(x=jnp.ones((1, 64), jnp.float16)), NotImplementedError, "x of float16: must be float32 or bfloat16"),
        (dict(activations="int4"), NotImplementedError, "activations='int4': must be None or 'int8'"),
        (dict(x=jnp.ones((1, 32))), ValueError, r"values \(8, 64\) of int8: hold 64 inputs an output, and x has 32"),
        (dict(qtype="float8_e4m3fn"), ValueError, "values of int8: those of float8_e4m3fn are"),
        (dict(scale=jnp.ones((1, 4))), ValueError, r"scale \(1, 4\): must be \[G, 8\]"),
    ],
)
def test_a_quantized_product_says_what_it_can_not_do(changes, error, message):
    given = dict(x=jnp.ones((1, 64)), values=jnp.ones((8, 64), jnp.int8), scale=jnp.ones((1, 8)), qtype="int8")
    with pytest.raises(error, match=message):
        quantized_matmul.tpu(**{**given, **changes})


def test_an_unknown_chip_or_kernel_is_told():
    with pytest.raises(NotImplementedError, match="TPU v3"):
        chips.of_kind("TPU v3")
    with pytest.raises(ValueError, match="v9"):
        chips.assume("v9")
    with pytest.raises(ValueError, match="must be one of decode_attention"):
        kernel("decode")


def test_the_table_gives_the_nearest_entry():
    shape = {"form": "float", "bits": 16, "K": 8, "S": 30_000, "H": 128, "window": 30_000}
    entry = next(e for e in tuning.table("decode_attention") if (e["chip"], e["class"]["S"]) == ("v6e", 32768))
    assert tuning.blocks("decode_attention", "v6e", shape) == entry["blocks"]
    assert tuning.blocks("decode_attention", "tpu7x", shape)  # not tuned: another chip's
    assert tuning.blocks("decode_attention", "v6e", shape | {"bits": 32}) == entry["blocks"]
    form = {"form": "int3", "group": 128, "M": 1, "I": 4096, "O": 4096}
    with pytest.raises(NotImplementedError, match="int3"):
        tuning.blocks("quantized_matmul", "v6e", form)


def test_blocks_of_wider_rows_are_shorter():
    chip = chips.CHIPS["tpu7x"]
    blocks = {"slots": 1024, "heads": 8, "buffers": 3, "splits": 1}
    assert tuning.fitting(blocks, 2 * 8 * 128 * 2, chip) == blocks
    assert tuning.fitting(blocks, 2 * 8 * 256 * 4, chip) == blocks | {"slots": 512}


def test_vmem_is_counted_in_tiles_of_the_dtype_and_of_two_bytes_at_least():
    spec = pl.BlockSpec((16, 128), lambda i: (i, 0))
    of = [jax.ShapeDtypeStruct((16, 128), dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.int8)]
    assert calls.vmem_bytes([spec] * 3, of, spec, of[0], []) == 2 * 16 * 128 * (4 + 2 + 2 + 4)
    assert calls.tiled_bytes((3, 5, 100), jnp.bfloat16) == 3 * 16 * 128 * 2
    assert calls.tiled_bytes((7,), jnp.float32) == 8 * 128 * 4
