"""The configuration in a GGUF file's metadata, for each architecture, and what contradicts it."""

import dataclasses
import math

import numpy as np
import pytest
from data import smollm2_gguf
from gguf_files import default_tensors, write_gguf

from jaxinfer.checkpoint.gguf import config_from_gguf
from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig, MoeConfig
from jaxinfer.ops.rope import RopeConfig

BASE = ModelConfig(
    family="llama",
    vocab_size=40,
    embed_dim=64,
    mlp_dim=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_context=128,
    norm_eps=float(np.float32(1e-5)),
    rope=RopeConfig(theta=50_000.0),
)
ENOUGH = {f"blk.{i}.attn_norm.weight": np.ones(64, np.float32) for i in range(46)}
GEMMA = {"block_count": 7, "attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 8}
GEMMA_CONFIG = {"num_layers": 7, "head_dim": 32, "activation": "gelu_tanh", "post_norms": True, "embed_scale": 8.0}
GEMMA_CONFIG |= {"attention_scale": 32**-0.5}
EXPERTS = {"expert_count": 8, "expert_used_count": 2}

CASES = {
    "llama": ("llama", {}, {}),
    "mixtral": (
        "llama",
        EXPERTS,
        {"family": "mixtral", "moe": MoeConfig(num_experts=8, experts_per_token=2, expert_dim=96)},
    ),
    "qwen2": ("qwen2", {}, {"family": "qwen2", "qkv_bias": True}),
    "qwen3": ("qwen3", {"attention.key_length": 32}, {"family": "qwen3", "head_dim": 32, "qk_norm": True}),
    "qwen3moe": (
        "qwen3moe",
        {**EXPERTS, "expert_feed_forward_length": 24, "feed_forward_length": None},
        {
            "family": "qwen3_moe",
            "qk_norm": True,
            "mlp_dim": 24,
            "moe": MoeConfig(num_experts=8, experts_per_token=2, expert_dim=24),
        },
    ),
    "gemma2": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope.freq_base": None},
        {
            **GEMMA_CONFIG,
            "family": "gemma2",
            "windows": (8, None, 8, None, 8, None, 8),
            "attention_softcap": 50.0,
            "final_softcap": 30.0,
            "rope": RopeConfig(theta=10_000.0),
        },
    ),
    "gemma3": (
        "gemma3",
        {**GEMMA, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        {
            **GEMMA_CONFIG,
            "family": "gemma3",
            "windows": (8, 8, 8, 8, 8, None, 8),
            "qk_norm": True,
            "rope": RopeConfig(theta=50_000.0, kind="linear", factor=8.0),
            "rope_local": RopeConfig(theta=10_000.0),
        },
    ),
    "gemma2 27B": (
        "gemma2",
        {**GEMMA, "block_count": 46},
        {
            **GEMMA_CONFIG,
            "family": "gemma2",
            "num_layers": 46,
            "windows": (8, None) * 23,
            "attention_softcap": 50.0,
            "final_softcap": 30.0,
            "attention_scale": 16**-0.5,
        },
    ),
    "multi-head": ("llama", {"attention.head_count_kv": None}, {"num_kv_heads": 4}),
    "yarn": (
        "qwen2",
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
        {
            "family": "qwen2",
            "qkv_bias": True,
            "rope": RopeConfig(theta=50_000.0, kind="yarn", factor=4.0, original_context=32),
        },
    ),
    "old linear": (
        "llama",
        {"rope.scale_linear": 2.0},
        {"rope": RopeConfig(theta=50_000.0, kind="linear", factor=2.0)},
    ),
}


def config_of(tmp_path, architecture, keys, extra=None, tied=True):
    tensors = {**default_tensors(), **(ENOUGH if keys.get("block_count", 2) != 2 else {}), **(extra or {})}
    if architecture == "qwen2":
        tensors["blk.0.attn_q.bias"] = np.zeros(64, np.float32)
    if not tied:
        tensors["output.weight"] = np.zeros((40, 64), np.float32)
    path = write_gguf(tmp_path / "a.gguf", architecture, keys=keys, tensors=tensors)
    return config_from_gguf(read_header(path), path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_config_of_each_architecture(tmp_path, case, tied):
    architecture, keys, expected = CASES[case]
    config = config_of(tmp_path, architecture, keys, tied=tied)
    assert config == dataclasses.replace(BASE, **expected, tie_embeddings=tied)


def llama3_divisors(theta, factor, low=1.0, high=4.0, original=8192):
    """llama.cpp's converter: each frequency's divisor, from its wavelength."""
    out = []
    for i in range(0, 16, 2):
        wavelength = 2 * math.pi * theta ** (i / 16)
        if wavelength < original / high:
            out.append(1.0)
        elif wavelength > original / low:
            out.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered_from_its_tensor(tmp_path, factor):
    config = config_of(tmp_path, "llama", {}, {"rope_freqs.weight": llama3_divisors(50_000.0, factor)})
    rope = RopeConfig(theta=50_000.0, kind="llama3", factor=factor, original_context=8192)
    assert config == dataclasses.replace(BASE, rope=rope)


def test_rope_freqs_of_ones_change_nothing(tmp_path):
    assert config_of(tmp_path, "llama", {}, {"rope_freqs.weight": np.ones(8, np.float32)}) == BASE


@pytest.mark.parametrize(
    "divisors",
    [llama3_divisors(50_000.0, 8.0, high=2.0), np.full(8, np.nan), np.zeros(8), np.ones(7), np.linspace(1, 8, 8)],
    ids=["other settings", "nan", "zeros", "length", "ramp"],
)
def test_other_rope_freqs_are_refused(tmp_path, divisors):
    with pytest.raises(InputError, match=r"tensor 'rope_freqs.weight'"):
        config_of(tmp_path, "llama", {}, {"rope_freqs.weight": divisors.astype(np.float32)})


REFUSED = {
    "architecture": (
        "gpt2",
        {},
        "general.architecture is 'gpt2', which is not supported; known: gemma2, gemma3, llama",
    ),
    "near architecture": ("qwen3next", {}, "did you mean 'qwen3'"),
    "missing": ("llama", {"embedding_length": None}, "llama.embedding_length is missing"),
    "missing eps": ("llama", {"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    "missing window": ("gemma3", {}, "gemma3.attention.sliding_window is missing"),
    "missing experts": ("qwen3moe", {}, "qwen3moe.expert_count is missing"),
    "string": ("llama", {"block_count": "two"}, "llama.block_count is 'two'"),
    "bool": ("llama", {"block_count": True}, "llama.block_count is True"),
    "float": ("llama", {"context_length": 128.0}, "llama.context_length is 128.0"),
    "per layer": ("llama", {"attention.head_count": [4, 2]}, r"attention.head_count is \[4, 2\]"),
    "zero": ("llama", {"attention.head_count": 0}, "llama.attention.head_count is 0"),
    "layers": ("llama", {"block_count": 4_000_000_000}, "llama.block_count is 4000000000"),
    "more layers than tensors": ("llama", {"block_count": 1000}, "block_count is 1000, but the file has"),
    "heads": (
        "llama",
        {"attention.head_count": 3, "attention.head_count_kv": 3},
        "head_count is 3, which does not divide",
    ),
    "kv heads": ("llama", {"attention.head_count_kv": 3}, "head_count_kv is 3, which does not divide"),
    "odd head": ("llama", {"attention.key_length": 15}, "a head has 15 dimensions"),
    "value length": ("llama", {"attention.value_length": 8}, "value_length is 8"),
    "partial rotary": ("llama", {"rope.dimension_count": 8}, "rope.dimension_count is 8"),
    "eps": ("llama", {"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
    "theta": ("llama", {"rope.freq_base": -1.0}, "rope.freq_base is -1.0"),
    "scaling": ("llama", {"rope.scaling.type": "longrope"}, "supported kinds are none, linear and yarn"),
    "embedding": ("llama", {"embedding_length": 32}, "'token_embd.weight' has the shape"),
    "experts": ("llama", {"expert_count": 2, "expert_used_count": 3}, "expert_used_count is 3, which is more"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_config_gets_one_line(tmp_path, case):
    architecture, keys, pattern = REFUSED[case]
    with pytest.raises(InputError, match=pattern) as error:
        config_of(tmp_path, architecture, keys)
    assert "a.gguf" in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_embedding_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", tensors={f"w{i}": np.ones(4, np.float32) for i in range(3)})
    with pytest.raises(InputError, match=r"no tensor 'token_embd\.weight'"):
        config_from_gguf(read_header(path), path)


def test_smollm2_config():
    path = smollm2_gguf()
    if path is None:
        pytest.skip("no SmolLM2 file: set JAXINFER_SMOLLM2 to its path")
    assert config_from_gguf(read_header(path), path) == dataclasses.replace(
        BASE,
        vocab_size=49152,
        embed_dim=576,
        mlp_dim=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_context=8192,
        rope=RopeConfig(theta=100_000.0),
    )
