"""GGUF files loaded as they are: the blocks of the file on the device, and the numbers of the dequantized model."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import smollm2_gguf
from gguf.constants import GGMLQuantizationType as Type
from gguf_blocks import decode, random_blocks
from gguf_files import write_gguf
from ml_collections import ConfigDict

import jaxinfer as ji
from jaxinfer import configuration, device
from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.checkpoint.gguf_tensors import entries
from jaxinfer.cli import main
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import QKV, GateUp
from jaxinfer.ops.quantized import Packed, dequantize, is_quantized, nbytes
from jaxinfer.passes import apply
from jaxinfer.tree import leaves

ROOT = Path(__file__).resolve().parent.parent
KEPT = (Type.Q8_0, Type.Q4_0, Type.Q4_1)
# Heads of 32, so that blocks of the output projection lie within one.
SIZES = {
    "embedding_length": 128,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}
D, F, N, K, H, V, E = 128, 96, 4, 2, 32, 96, 3


def tensors(kind, layers=2, experts=False, untied=False, biases=False, **kinds):
    """Return a random model's tensors, its matrices in blocks of `kind`, or of another where `kinds` names one."""
    rng = np.random.default_rng(0)

    def matrix(name, *shape):
        numbers = (rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32)
        chosen = kinds.get(name, kind)
        return (gguf.quants.quantize(numbers, chosen), chosen) if chosen is not None else numbers

    out = {"token_embd.weight": matrix("token_embd", V, D), "output_norm.weight": np.ones(D, np.float32)}
    if untied:
        out["output.weight"] = matrix("output", V, D)
    for i in range(layers):
        layer = {"attn_q": (N * H, D), "attn_k": (K * H, D), "attn_v": (K * H, D), "attn_output": (D, N * H)}
        wide = {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        if experts:
            wide = {name + "_exps": (E, *shape) for name, shape in wide.items()}
            out[f"blk.{i}.ffn_gate_inp.weight"] = rng.normal(size=(E, D)).astype(np.float32)
        for name, shape in {**layer, **wide}.items():
            out[f"blk.{i}.{name}.weight"] = matrix(name, *shape)
        for name, size in {"attn_q": N * H, "attn_k": K * H, "attn_v": K * H}.items() if biases else ():
            out[f"blk.{i}.{name}.bias"] = rng.normal(size=size).astype(np.float32)
        for norm in ("attn_norm", "ffn_norm"):
            out[f"blk.{i}.{norm}.weight"] = rng.uniform(0.5, 1.5, D).astype(np.float32)
    return out


def write(path, kind, keys=None, architecture="llama", layers=2, **options):
    experts = {"expert_count": E, "expert_used_count": 2} if options.get("experts") else {}
    sizes = {**SIZES, "block_count": layers, **experts, **(keys or {})}
    return write_gguf(path, architecture, sizes, tensors(kind, layers, **options))


def assert_same_logits(a, b, atol=1e-3):
    tokens = np.random.default_rng(1).integers(0, V, (2, 9))
    want = np.asarray(ji.logits(b, tokens))
    assert want.std() > 0.1
    np.testing.assert_allclose(ji.logits(a, tokens), want, atol=atol)


def kinds_of(program):
    """Return the kind of every kernel and table of the program by its path."""
    found = jax.tree_util.tree_flatten_with_path(program.model, is_leaf=is_quantized)[0]
    return {jax.tree_util.keystr(k, simple=True, separator="."): getattr(leaf, "qtype", None) for k, leaf in found}


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_blocks_taken_apart_are_the_numbers_that_ggml_defines(tmp_path, kind):
    data = random_blocks(kind, rows=6, columns=96)
    path = write_gguf(tmp_path / "a.gguf", tensors={"w": (data, kind)})
    (entry,) = entries(read_header(path), path).values()
    packed = entry.blocks()
    assert packed.shape == (6, 96) and sum(part.nbytes for part in jax.tree.leaves(packed)) == data.nbytes
    assert all(isinstance(part, np.ndarray) and part.dtype != np.float32 for part in jax.tree.leaves(packed))
    np.testing.assert_array_equal(dequantize(jax.tree.map(jnp.asarray, packed)), entry.read())
    np.testing.assert_allclose(entry.read(), decode(kind, data, 96), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.name)
def test_a_file_loads_as_it_is(tmp_path, kind, experts):
    path = write(tmp_path / "a.gguf", kind, layers=1, experts=experts)
    kept, plain = ji.load(path, "float32", keep_quantized=True), ji.load(path, "float32")
    in_file = sum(info.nbytes for info in read_header(path).tensors.values())
    assert nbytes(kept.model) <= 1.05 * in_file < 0.5 * nbytes(plain.model)
    quantized = {path for path, kind in kinds_of(kept).items() if kind}
    assert len(quantized) == len(kept.model.layers) * (5 if experts else 4) + 1  # q, k, v are one, and gate, up
    assert {
        path for path in kinds_of(kept) if path.endswith(("kernel", "table")) and ".router." not in path
    } == quantized
    assert_same_logits(kept, plain)


def test_kernels_of_different_kinds_stay_separate(tmp_path):
    kinds = {"attn_v": Type.Q8_0, "ffn_up": None, "ffn_down": Type.Q5_0}
    path = write(tmp_path / "a.gguf", Type.Q4_1, layers=1, untied=True, output=Type.Q4_0, **kinds)
    kept, plain = ji.load(path, "float32", keep_quantized=True), ji.load(path, "float32")
    block = kept.model.layers[0]
    assert isinstance(block.attention.qkv, QKV) and isinstance(block.mlp.gate_up, GateUp)
    found = {path.removeprefix("layers.0."): kind for path, kind in kinds_of(kept).items()}
    assert found == {
        **dict.fromkeys(("attention_norm.scale", "mlp_norm.scale", "final_norm.scale"), None),
        **dict.fromkeys(("mlp.gate_up.up.kernel", "mlp.down.kernel"), None),
        **dict.fromkeys(("attention.qkv.q.kernel", "attention.qkv.k.kernel", "attention.o.kernel"), "uint4"),
        **{"attention.qkv.v.kernel": "int8", "mlp.gate_up.gate.kernel": "uint4"},
        **{"embed.table": "uint4", "unembed.kernel": "int4"},
    }
    assert_same_logits(kept, plain)


def test_biases_are_fused_with_the_blocks(tmp_path):
    path = write(tmp_path / "a.gguf", Type.Q4_0, layers=1, architecture="qwen2", biases=True)
    kept, plain = ji.load(path, "float32", keep_quantized=True), ji.load(path, "float32")
    linear = kept.model.layers[0].attention.qkv.linear
    assert isinstance(linear.kernel, Packed) and linear.eq == "btd,nhd->btnh" and linear.bias.shape == (N + 2 * K, H)
    assert_same_logits(kept, plain)


def test_heads_that_would_cut_blocks_are_dequantized(tmp_path):
    keys = {"attention.head_count": 8, "attention.head_count_kv": 4}  # heads of 16
    path = write(tmp_path / "a.gguf", Type.Q8_0, layers=1, keys=keys)
    kept, plain = ji.load(path, "float32", keep_quantized=True), ji.load(path, "float32")
    assert [path for path, kind in kinds_of(kept).items() if not kind and "norm" not in path] == [
        "layers.0.attention.o.kernel"
    ]
    assert_same_logits(kept, plain)


@pytest.mark.parametrize("layouts", [(), ("fused",), ("long_last",), ("fused", "long_last")], ids="+".join)
def test_every_layout_gives_the_same_numbers(tmp_path, layouts, monkeypatch):
    choice = device.Choice(jnp.dtype("float32"), layouts, ())
    monkeypatch.setattr("jaxinfer.device.choose", lambda *_: choice)
    path = write(tmp_path / "a.gguf", Type.Q4_1, layers=1, ffn_down=None)
    kept, plain = ji.load(path, keep_quantized=True), ji.load(path)
    assert kept.layouts == layouts and isinstance(kept.model.layers[0].attention.o.kernel, Packed)
    assert_same_logits(kept, plain)


def test_a_program_with_blocks_is_saved_as_it_is(tmp_path):
    path = write(tmp_path / "a.gguf", Type.Q4_1, layers=1, experts=True, attn_v=Type.Q8_0)
    kept = apply(ji.load(path, "float32", keep_quantized=True), "kv_int8")
    ji.save(kept, tmp_path / "saved")
    again = ji.load(tmp_path / "saved")
    assert again.blocks == kept.blocks and again.passes == kept.passes and kinds_of(again) == kinds_of(kept)
    for name, leaf in leaves(kept.model).items():
        np.testing.assert_array_equal(leaves(again.model)[name], leaf, err_msg=name)
    assert_same_logits(again, kept, atol=1e-5)
    narrow = ji.load(tmp_path / "saved", "bfloat16")
    assert narrow.model.embed.table.dtype == jnp.bfloat16 and narrow.model.embed.table.scale.dtype == jnp.float16
    with pytest.raises(InputError, match="saved: keep_quantized is for GGUF files, and a saved program stays as it is"):
        ji.load(tmp_path / "saved", keep_quantized=True)


def test_passes_that_quantize_are_refused(tmp_path):
    path = write(tmp_path / "a.gguf", Type.Q4_1, layers=1)
    with pytest.raises(InputError, match="quantized already"):
        apply(ji.load(path, "float32", keep_quantized=True), "int8")


def test_a_checkpoint_without_such_blocks_is_refused(tmp_path):
    floats = write(tmp_path / "f32.gguf", None, layers=1)
    with pytest.raises(InputError, match=r"f32.gguf: keep_quantized is for GGUF files with .*, this has float32"):
        ji.load(floats, keep_quantized=True)
    golden = next((Path(__file__).parent / "goldens").glob("*/model.safetensors")).parent
    with pytest.raises(InputError, match="keep_quantized is for GGUF files with Q8_0, Q4_0 or Q4_1 tensors, this has "):
        ji.load(golden, keep_quantized=True)


def test_a_damaged_scale_names_the_tensor(tmp_path):
    made = tensors(Type.Q4_1, layers=1)
    blocks, _ = made["blk.0.ffn_down.weight"]
    blocks[5, 2:4] = np.array(np.inf, "<f2").reshape(1).view(np.uint8)  # the minimum of a block
    path = write_gguf(tmp_path / "a.gguf", keys={**SIZES, "block_count": 1}, tensors=made)
    with pytest.raises(InputError, match=r"tensor 'blk.0.ffn_down.weight' \(Q4_1\) has a NaN or infinite value"):
        ji.load(path, "float32", keep_quantized=True)


def test_the_command_line_and_configs_take_it(tmp_path, capsys):
    path = write(tmp_path / "a.gguf", Type.Q4_1, layers=1)
    held = nbytes(ji.load(path, "float32", keep_quantized=True).model)
    for flags, same in ((["--keep-quantized"], True), ([], False)):
        assert main(["info", str(path), "--dtype", "float32", "--json", *flags]) == 0
        sizes = json.loads(capsys.readouterr().out)["bytes_in_memory"]
        assert (sum(sizes.values()) == held) is same
    config = configuration.defaults()
    config.model, config.dtype, config.keep_quantized = str(path), "float32", True
    assert nbytes(configuration.from_config(config).model) == held
    random = configuration.read_config(str(ROOT / "configs" / "tiny.py"))
    random.keep_quantized = True
    with pytest.raises(InputError, match="keep_quantized=True: is for GGUF files, and architecture asks for random"):
        configuration.check(random)
    with pytest.raises(InputError, match="keep_quantized='yes': must be bool"):
        configuration.check(ConfigDict({"keep_quantized": "yes"}))


PEAK = """
import sys
import jax, numpy as np
import jaxinfer as ji

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

jax.device_put(np.ones(64)).block_until_ready()
ji.load(sys.argv[1])  # a saved tiny program: what a load imports, and no weights to speak of
before = memory("VmRSS")
program = ji.load(sys.argv[2], "float32", keep_quantized=True)
print(memory("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(program.model)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="measures host memory, where the model is on the CPU")
def test_a_real_file_is_loaded_without_floats(tmp_path):
    path = smollm2_gguf()
    if path is None:
        pytest.skip("no SmolLM2 file: set JAXINFER_SMOLLM2 to its path")
    kept, plain = ji.load(path, "float32", keep_quantized=True), ji.load(path, "float32")
    assert nbytes(kept.model) == pytest.approx(path.stat().st_size, rel=0.05)
    assert_same_logits(kept, plain)
    tiny = write(tmp_path / "a.gguf", Type.Q4_1, layers=1)
    command = [sys.executable, "-c", PEAK, str(tiny), str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    peak, held = map(int, out.split())
    assert peak < 1.5 * held, (peak, held)  # the embedding alone takes more than that in float32
