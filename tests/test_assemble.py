"""Assembling a model: every stored form gives the same tree, and whatever does not fit is named before it is read."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint import assemble as assembling
from jaxinfer.checkpoint.assemble import assemble
from jaxinfer.checkpoint.base import Entry
from jaxinfer.checkpoint.hf_config import config_from_hf
from jaxinfer.checkpoint.names import gguf_names, hf_names
from jaxinfer.checkpoint.safetensors_files import entries
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import Transformer, abstract
from jaxinfer.tree import leaves

GOLDENS = Path(__file__).parent / "goldens"
CASES = sorted(file.parent.name for file in GOLDENS.glob("*/model.safetensors"))
FLOAT32 = jnp.dtype("float32")
ROOT = Path(__file__).resolve().parent.parent


def read_config(case: str) -> ModelConfig:
    file = GOLDENS / case / "config.json"
    return config_from_hf(json.loads(file.read_text()), file)


def stored(case: str) -> dict[str, np.ndarray]:
    return {name: entry.read() for name, entry in entries(GOLDENS / case).items()}


def as_entries(arrays: dict[str, np.ndarray]) -> dict[str, Entry]:
    return {n: Entry(n, a.shape, a.dtype.name, a.nbytes, lambda a=a: a) for n, a in arrays.items()}


def from_hf(config: ModelConfig, arrays: dict[str, np.ndarray], dtype=FLOAT32, **options) -> Transformer:
    path = Path("model.safetensors")
    return assemble(abstract(config, dtype), config, as_entries(arrays), hf_names(config), path=path, **options)


def assert_same(a: Transformer, b: Transformer) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


@pytest.mark.parametrize("case", CASES)
def test_every_golden_assembles(case):
    config = read_config(case)
    shapes = leaves(abstract(config))
    model = leaves(from_hf(config, stored(case)))
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in model.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in shapes.items()
    }


def test_layouts_are_those_of_the_equations():
    """Each projection of the model equals the matrix product that the stored [out, in] weight stands for."""
    config, arrays = read_config("llama_mqa"), stored("llama_mqa")
    block = from_hf(config, arrays).layers[1]
    D, N, H, F = config.embed_dim, config.num_heads, config.head_dim, config.mlp_dim
    rng = np.random.default_rng(0)
    x, heads, wide = rng.normal(size=(1, 1, D)), rng.normal(size=(1, 1, N, H)), rng.normal(size=(1, 1, F))

    def product(name: str, x: np.ndarray) -> np.ndarray:
        name = "model.layers.1." + name
        return arrays[name + ".weight"] @ x.reshape(-1) + arrays[name + ".bias"]

    for module, name, argument in (
        (block.attention.qkv.q, "self_attn.q_proj", x),
        (block.attention.qkv.k, "self_attn.k_proj", x),
        (block.attention.qkv.v, "self_attn.v_proj", x),
        (block.attention.o, "self_attn.o_proj", heads),
        (block.mlp.gate_up.gate, "mlp.gate_proj", x),
        (block.mlp.gate_up.up, "mlp.up_proj", x),
        (block.mlp.down, "mlp.down_proj", wide),
    ):
        found = np.asarray(module(jnp.asarray(argument, jnp.float32))).reshape(-1)
        np.testing.assert_allclose(found, product(name, argument), atol=1e-5, err_msg=name)


def test_gemma_norms_get_their_one():
    arrays = stored("gemma2")
    model = from_hf(read_config("gemma2"), arrays)
    np.testing.assert_array_equal(model.final_norm.scale, arrays["model.norm.weight"] + 1)
    for name, path in {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "attention_post_norm",
        "pre_feedforward_layernorm": "mlp_norm",
        "post_feedforward_layernorm": "mlp_post_norm",
    }.items():
        expected = arrays[f"model.layers.0.{name}.weight"] + 1
        np.testing.assert_array_equal(getattr(model.layers[0], path).scale, expected, err_msg=name)


def test_leaves_have_their_abstract_dtype():
    config, arrays = read_config("qwen3"), stored("qwen3")
    model = leaves(from_hf(config, arrays, jnp.dtype("bfloat16")))
    full = leaves(from_hf(config, arrays))
    for path, leaf in model.items():
        assert leaf.dtype == (jnp.float32 if path.endswith("scale") else jnp.bfloat16), path
        np.testing.assert_array_equal(leaf, full[path].astype(leaf.dtype), err_msg=path)
    halves = {name: a.astype(np.float16) for name, a in arrays.items()}
    for path, leaf in leaves(from_hf(config, halves)).items():
        np.testing.assert_array_equal(leaf, np.asarray(full[path]).astype(np.float16).astype(np.float32), err_msg=path)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_fused_experts_are_the_same_model(case):
    """transformers 5 holds (and may store) the experts of a layer as two stacked tensors."""
    config, arrays = read_config(case), stored(case)
    fused = {name: a for name, a in arrays.items() if ".experts." not in name}
    gate, up, down = ("w1", "w3", "w2") if case == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    where = "block_sparse_moe" if case == "mixtral" else "mlp"
    for i in range(config.num_layers):
        if not config.is_moe(i):
            continue

        def stack(kind: str, layer: int = i) -> np.ndarray:
            names = [f"model.layers.{layer}.{where}.experts.{e}.{kind}.weight" for e in range(config.moe.num_experts)]
            return np.stack([arrays[name] for name in names])

        prefix = f"model.layers.{i}.mlp."
        fused[prefix + "experts.gate_up_proj"] = np.concatenate([stack(gate), stack(up)], axis=1)
        fused[prefix + "experts.down_proj"] = stack(down)
        if case == "mixtral":
            fused[prefix + "gate.weight"] = fused.pop(f"model.layers.{i}.{where}.gate.weight")
    assert_same(from_hf(config, fused), from_hf(config, arrays))


GGUF = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "block_sparse_moe.gate.": "ffn_gate_inp.",
    "mlp.gate.": "ffn_gate_inp.",
}  # fmt: skip


def to_gguf(config: ModelConfig, arrays: dict[str, np.ndarray], stacked: bool = True) -> dict[str, np.ndarray]:
    """Store a Hugging Face checkpoint as llama.cpp's converter does: its names, its order of rotary pairs, stacks."""

    def interleave(w: np.ndarray, heads: int) -> np.ndarray:
        return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

    out: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for name, a in arrays.items():
        if config.family in ("llama", "mixtral"):
            a = interleave(a, config.num_heads) if "q_proj" in name else a
            a = interleave(a, config.num_kv_heads) if "k_proj" in name else a
        if config.family.startswith("gemma") and "norm" in name:
            a = a + 1
        if ".experts." in name:
            layer, (e, kind) = name.split(".")[2], name.split(".")[-3:-1]
            kind = {"w1": "gate", "w3": "up", "w2": "down"}.get(kind, kind.removesuffix("_proj"))
            if stacked:
                experts.setdefault(f"blk.{layer}.ffn_{kind}_exps.weight", []).append((int(e), a))
            else:
                out[f"blk.{layer}.ffn_{kind}.{e}.weight"] = a
            continue
        post = "post_attention_norm" if config.post_norms else "ffn_norm"
        for hf, gguf in {**GGUF, "post_attention_layernorm": post}.items():
            name = name.replace(hf, gguf)
        out[name] = a
    stacks = {name: np.stack([a for _, a in sorted(found, key=lambda f: f[0])]) for name, found in experts.items()}
    return {**out, **stacks}


GGUF_CASES = ["llama_mqa", "llama3", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize(
    "case, stacked",
    [*((case, True) for case in GGUF_CASES), ("mixtral", False)],  # old Mixtral files hold each expert alone
)
def test_gguf_names_give_the_same_model(case, stacked):
    config, arrays = read_config(case), stored(case)
    converted = as_entries({**to_gguf(config, arrays, stacked), "rope_freqs.weight": np.ones(4, np.float32)})
    model = assemble(abstract(config), config, converted, gguf_names(config), path=Path("model.gguf"))
    assert_same(model, from_hf(config, arrays))


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_multimodal_gemma3(prefix):
    config, arrays = read_config("gemma3_text"), stored("gemma3_text")
    other = {name.replace("model.", prefix, 1): a for name, a in arrays.items()}
    vision = "model." if prefix.startswith("model") else ""
    other[vision + "vision_tower.vision_model.embeddings.position_ids"] = np.zeros((1, 4), np.int64)
    other[vision + "multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(3, np.float32)
    assert_same(from_hf(config, other), from_hf(config, arrays))


def test_ignored_names():
    config, arrays = read_config("qwen2"), stored("qwen2")  # tied embeddings
    extra = {
        "lm_head.weight": arrays["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    assert_same(from_hf(config, {**arrays, **extra}), from_hf(config, arrays))


def misfit(config: ModelConfig, arrays: dict[str, np.ndarray]) -> str:
    """Return the message of the misfit; no tensor may be read for it."""

    def read() -> np.ndarray:
        raise AssertionError("a tensor was read before names and shapes were settled")

    headers = {name: dataclasses.replace(entry, read=read) for name, entry in as_entries(arrays).items()}
    with pytest.raises(InputError) as error:
        assemble(abstract(config), config, headers, hf_names(config), path=Path("some/dir"))
    return str(error.value)


def test_all_misfits_come_in_one_message():
    config, arrays = read_config("llama2"), stored("llama2")
    del arrays["model.norm.weight"]
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    arrays["model.layers.1.mlp.down_proj.weight"] = np.zeros((32, 41), np.float32)
    arrays["language_model.model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"]
    message = misfit(config, arrays)
    assert message.startswith("some/dir: the tensors are not those of the 2-layer llama model")
    assert "1 missing, 2 unexpected, 1 misshapen" in message
    assert "  missing: model.norm.weight\n" in message
    assert "  unexpected: model.layers.0.self_attn.q_proj.bias" in message
    assert "embed_tokens.weight (a second spelling of" in message
    assert "  misshapen: model.layers.1.mlp.down_proj.weight is [32, 41], expected [32, 40]" in message


def test_many_misfits_are_counted_and_cut():
    config, arrays = read_config("llama2"), stored("llama2")
    message = misfit(dataclasses.replace(config, num_layers=4), arrays)  # as if it were deeper
    assert "18 missing" in message and "  missing: and 8 more" in message and len(message.splitlines()) == 12
    message = misfit(dataclasses.replace(config, num_layers=1), arrays)
    assert "9 unexpected" in message and "missing" not in message


def test_a_missing_expert_is_named():
    config, arrays = read_config("mixtral"), stored("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del arrays[name]
    assert f"1 missing; use the configuration that was saved with these weights\n  missing: {name}" in misfit(
        config, arrays
    )


def test_a_leaf_without_a_stored_name_is_reported():
    config = dataclasses.replace(read_config("llama2"))
    tree = {"model": abstract(config)}
    with pytest.raises(
        InputError, match=r"model\.embed\.table \(a leaf of the model that this format has no name for\)"
    ):
        assemble(tree, config, as_entries(stored("llama2")), hf_names(config), path=Path("x"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_are_not_finite_are_refused(value, dtype):
    config, arrays = read_config("mixtral"), stored("mixtral")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.block_sparse_moe.experts.3.w2.weight"):
        broken = {**arrays, name: arrays[name].copy()}
        broken[name][1, 2] = value
        with pytest.raises(InputError, match=f"{name}.* has a NaN or infinite value as {dtype}"):
            from_hf(config, broken, jnp.dtype(dtype))


def test_overflow_of_a_narrow_dtype_is_refused():
    config, arrays = read_config("llama2"), stored("llama2")
    arrays["lm_head.weight"][0, 0] = 1e5  # float16 ends at 65504
    assert float(from_hf(config, arrays, jnp.dtype("bfloat16")).unembed.kernel[0, 0]) > 9e4
    with pytest.raises(InputError, match=r"lm_head\.weight.* value as float16.* load it in a wider dtype"):
        from_hf(config, arrays, jnp.dtype("float16"))


def test_leaves_go_where_sharding_of_says():
    config, arrays = read_config("llama2"), stored("llama2")
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    asked = {}

    def sharding_of(path: str, leaf: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
        spec = ("model",) if path.endswith("kernel") else ()
        asked[path] = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return asked[path]

    model = leaves(from_hf(config, arrays, sharding_of=sharding_of))
    assert {path: leaf.sharding for path, leaf in model.items()} == asked


def test_what_lies_on_no_device_of_this_process_is_not_read(monkeypatch):
    """As a stage's layers are not where other processes have the stage."""
    config, arrays = read_config("llama2"), stored("llama2")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    away = SimpleNamespace(addressable_devices=frozenset())
    read, elsewhere = [], []
    monkeypatch.setattr(
        assembling, "elsewhere", lambda x, sharding: elsewhere.append(sharding) or jnp.zeros(x.shape, x.dtype)
    )

    def noting(entry: Entry) -> Entry:
        return dataclasses.replace(entry, read=lambda: read.append(entry.name) or entry.read())

    noted = {name: noting(entry) for name, entry in as_entries(arrays).items()}
    options = dict(path=Path("model.safetensors"), sharding_of=lambda path, _: away if "layers.1." in path else here)
    model = leaves(assemble(abstract(config, FLOAT32), config, noted, hf_names(config), **options))
    assert elsewhere == [away] * len([path for path in model if "layers.1." in path])
    assert read and sorted(read) == sorted(name for name in noted if ".layers.1." not in name)


def test_progress_is_shown_when_asked(capsys):
    config, arrays = read_config("llama2"), stored("llama2")
    from_hf(config, arrays)
    assert capsys.readouterr().err == ""
    from_hf(config, arrays, progress=True)
    assert "loading model.safetensors: 100%" in capsys.readouterr().err


PEAK = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jaxinfer.checkpoint.assemble import assemble
from jaxinfer.checkpoint.names import hf_names
from jaxinfer.checkpoint.safetensors_files import entries
from jaxinfer.models.config import ModelConfig
from jaxinfer.models.transformer import abstract
from safetensors.numpy import save_file

path, dtype = Path(sys.argv[1]), sys.argv[2]
config = ModelConfig(family="llama", vocab_size=16384, embed_dim=512, mlp_dim=1536, num_layers=10, num_heads=8,
                     num_kv_heads=4, head_dim=64, max_context=64, tie_embeddings=False)
if dtype == "write":
    tree, arrays = abstract(config), {}
    rules = {rule.path: rule for rule in reversed(hf_names(config).rules)}
    from jaxinfer.tree import leaves
    for leaf_path, leaf in leaves(tree).items():
        parts = leaf_path.split(".")
        layer = parts[1] if parts[0] == "layers" else ""
        rule = rules[leaf_path.replace(f"layers.{layer}.", "layers.{i}.") if layer else leaf_path]
        arrays[rule.pattern.replace("{i}", layer)] = np.ones(rule.transform.stored(leaf.shape), np.float32)
    save_file(arrays, path)
    sys.exit()

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

jax.device_put(np.ones(64)).block_until_ready()
model, before = abstract(config, dtype), memory("VmRSS")
model = assemble(model, config, entries(path), hf_names(config), path=path)
print((memory("VmHWM") - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(model)))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="measures host memory, where the model is on the CPU backend"
)
def test_peak_memory_is_near_the_final_model(tmp_path):
    """Loading 190 MB of float32 peaks below 1.25 of the model, in float32 and when narrowed to bfloat16."""

    def run(dtype: str) -> str:
        command = [sys.executable, "-c", PEAK, str(tmp_path / "model.safetensors"), dtype]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout

    run("write")
    for dtype in ("float32", "bfloat16"):
        assert float(run(dtype)) < 1.25, dtype
