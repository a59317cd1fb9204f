"""config.json: each family as transformers reads it, in both spellings, with no key read in vain."""

import copy
import json
from pathlib import Path

import pytest

from jaxinfer.checkpoint.hf_config import FAMILIES, config_from_hf, generation_defaults
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig, MoeConfig
from jaxinfer.ops.rope import RopeConfig

PATH = Path("some/config.json")
GOLDENS = sorted((Path(__file__).parent / "goldens").glob("*/config.json"))
SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def read(model_type: str, **keys) -> ModelConfig:
    return config_from_hf({"model_type": model_type, **SIZES, **keys}, PATH)


def refused(expected: str, model_type: str, **keys) -> None:
    with pytest.raises(InputError) as error:
        read(model_type, **keys)
    assert expected in str(error.value), error.value
    assert str(PATH) in str(error.value) and "\n" not in str(error.value)


# What transformers 5 assumes where a key is missing (its configuration classes were asked, one by one).
DEFAULTS = {
    "llama": dict(head_dim=8, max_context=2048),
    "mistral": dict(head_dim=8, max_context=131_072, windows=(4096,) * 4),
    "mixtral": dict(
        head_dim=8,
        max_context=131_072,
        norm_eps=1e-5,
        rope=RopeConfig(theta=1e6),
        moe=MoeConfig(num_experts=8, experts_per_token=2, expert_dim=96),
    ),
    "qwen2": dict(head_dim=8, max_context=32_768, qkv_bias=True),
    "qwen3": dict(head_dim=128, max_context=32_768, qk_norm=True),
    "qwen3_moe": dict(
        head_dim=8,
        max_context=32_768,
        qk_norm=True,
        moe=MoeConfig(num_experts=128, experts_per_token=8, expert_dim=768, normalize_weights=False),
    ),
    "gemma2": dict(
        head_dim=256,
        max_context=8192,
        activation="gelu_tanh",
        windows=(4096, None, 4096, None),
        post_norms=True,
        embed_scale=8.0,
        attention_scale=1 / 16,
        attention_softcap=50.0,
        final_softcap=30.0,
        tie_embeddings=True,
    ),
    "gemma3_text": dict(
        family="gemma3",
        head_dim=256,
        max_context=131_072,
        activation="gelu_tanh",
        rope=RopeConfig(theta=1e6),
        rope_local=RopeConfig(theta=1e4),
        windows=(4096,) * 4,
        qk_norm=True,
        post_norms=True,
        embed_scale=8.0,
        attention_scale=1 / 16,
        tie_embeddings=True,
    ),
}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_defaults_of_missing_keys(model_type):
    sizes = dict(vocab_size=100, embed_dim=64, mlp_dim=96, num_layers=4, num_heads=8, num_kv_heads=4)
    plain = dict(family=model_type, tie_embeddings=False)
    assert read(model_type) == ModelConfig(**{**sizes, **plain, **DEFAULTS[model_type]})


def test_every_family_has_defaults_tested():
    assert set(FAMILIES) == {*DEFAULTS, "gemma3"}


def test_null_kv_heads_are_as_many_as_query_heads():
    assert read("mistral", num_key_value_heads=None).num_kv_heads == 8
    missing = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert config_from_hf({"model_type": "gemma2", **missing}, PATH).num_kv_heads == 4


def test_old_and_new_spelling_agree():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = read(
        "llama", max_position_embeddings=131_072,
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling},
    )  # fmt: skip
    for key in ("type", "rope_type"):
        old = read("llama", max_position_embeddings=131_072, rope_theta=500000, rope_scaling={key: "llama3", **scaling})
        assert old == new
    assert new.rope == RopeConfig(theta=5e5, kind="llama3", factor=8.0, original_context=8192)

    old = read(
        "gemma3_text", rope_theta=2e6, rope_local_base_freq=5e3, rope_scaling={"rope_type": "linear", "factor": 8.0},
        sliding_window_pattern=2,
    )  # fmt: skip
    new = read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        },
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    assert old == new
    assert (new.rope, new.rope_local) == (RopeConfig(theta=2e6, kind="linear", factor=8.0), RopeConfig(theta=5e3))
    assert new.windows == (4096, None, 4096, None)


def test_rope_kinds():
    def rope(**spec):
        return read("llama", max_position_embeddings=64, rope_scaling=spec or None)

    assert rope().rope == RopeConfig()
    linear = rope(type="linear", factor=4)
    assert linear.rope == RopeConfig(kind="linear", factor=4.0) and linear.max_context == 256
    ntk = rope(type="dynamic", factor=2.0)
    assert ntk.rope == RopeConfig(kind="ntk", factor=2.0, original_context=64) and ntk.max_context == 128
    yarn = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16, truncate=False)
    assert yarn.rope == RopeConfig(kind="yarn", factor=4.0, original_context=16, beta_fast=16.0, truncate=False)
    assert yarn.max_context == 64
    assert rope(rope_type="yarn", original_max_position_embeddings=16).rope.factor == 4.0  # the ratio of the contexts
    stated = rope(rope_type="yarn", factor=4.0, attention_factor=0.7, mscale=1.0, mscale_all_dim=0.5)
    assert stated.rope.attention_factor == 0.7
    implied = rope(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5).rope.attention_factor
    assert implied == pytest.approx(1.13862943611 / 1.06931471806)  # (0.1 ln 4 + 1) / (0.05 ln 4 + 1)
    assert rope(rope_type="yarn", factor=4.0, mscale=1.0).rope.attention_factor is None  # as transformers: both or none


def test_windows():
    assert read("mistral", sliding_window=8).windows == (8,) * 4
    assert read("mistral", sliding_window=None).windows == ()
    assert read("mixtral", sliding_window=8).windows == (8,) * 4
    assert read("qwen2", sliding_window=8, max_window_layers=2).windows == ()
    assert read("qwen2", sliding_window=8, max_window_layers=2, use_sliding_window=True).windows == (None, None, 8, 8)
    assert read("qwen3", sliding_window=8, max_window_layers=9, use_sliding_window=True).windows == ()
    assert read("qwen3_moe", sliding_window=8, use_sliding_window=True).windows == (8,) * 4
    mixed = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    assert read("qwen3", sliding_window=8, use_sliding_window=True, layer_types=mixed).windows == (None, 8, None, None)
    assert read("gemma2", sliding_window=8, layer_types=mixed).windows == (None, 8, None, None)
    assert read("gemma3_text", num_hidden_layers=7, sliding_window=8).windows == (8, 8, 8, 8, 8, None, 8)
    refused("sliding_window is 8, but layer_types", "qwen2", sliding_window=8, layer_types=mixed)
    refused("layer_types is ['full_attention']", "gemma2", layer_types=["full_attention"])
    refused("layer_types is ['chunked'", "gemma2", layer_types=["chunked"] * 4)


def test_experts():
    moe = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
    expected = MoeConfig(num_experts=4, experts_per_token=2, expert_dim=32)
    assert read("qwen3_moe", **moe).moe == expected
    renamed = {"num_local_experts" if key == "num_experts" else key: value for key, value in moe.items()}
    assert read("qwen3_moe", **renamed).moe == expected  # as transformers 5 writes it
    assert read("qwen3_moe", **moe, decoder_sparse_step=2).moe.layers == (1, 3)
    assert read("qwen3_moe", **moe, mlp_only_layers=[0, 2]).moe.layers == (1, 3)
    assert read("qwen3_moe", **moe, mlp_only_layers=[0, 1, 2, 3]).moe is None
    assert read("qwen3_moe", **{**moe, "num_experts": 0}).moe is None
    refused(
        "num_experts_per_tok is 9, which is more than num_experts, 4", "qwen3_moe", **{**moe, "num_experts_per_tok": 9}
    )
    refused("num_local_experts is 0", "mixtral", num_local_experts=0)


def test_multimodal_gemma3_gives_its_language_model():
    text = {"model_type": "gemma3_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    config = config_from_hf({"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}}, PATH)
    assert config == read("gemma3_text", vocab_size=262_208)
    untied = config_from_hf({"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}, PATH)
    assert not untied.tie_embeddings


# For each golden config: keys that describe the architecture, each with another legal value. Reading one in vain
# (or not at all) would leave the result as it was.
CHANGES = {
    "vocab_size": 65,
    "hidden_size": 48,
    "intermediate_size": 41,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": "fewer",
    "head_dim": 6,
    "max_position_embeddings": 999,
    "rms_norm_eps": 1e-3,
    "hidden_act": "gelu_new",
    "hidden_activation": "silu",
    "tie_word_embeddings": "flip",
    "attention_bias": "flip",
    "mlp_bias": "flip",
    "norm_topk_prob": "flip",
    "query_pre_attn_scalar": 99,
    "attn_logit_softcapping": 3.5,
    "final_logit_softcapping": 3.5,
    "sliding_window": 5,
    "layer_types": "reverse",
    "rope_parameters": "theta",
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 15,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 2,
}
# Keys that transformers writes for every family but that change nothing in these.
WITHOUT_EFFECT = {
    "layer_types": ("qwen2", "qwen3"),  # all layers are of one kind
    "sliding_window": ("qwen2", "qwen3", "qwen3_moe"),  # switched off
    "attn_logit_softcapping": ("gemma3_text",),  # transformers never applies it
}


@pytest.mark.parametrize("file", GOLDENS, ids=lambda file: file.parent.name)
def test_no_key_is_read_in_vain(file):
    original = json.loads(file.read_text())
    base = config_from_hf(copy.deepcopy(original), file)
    for key, value in CHANGES.items():
        if key not in original or file.parent.name in WITHOUT_EFFECT.get(key, ()):
            continue
        changed = copy.deepcopy(original)
        if value == "flip":
            changed[key] = not changed[key]
        elif value == "reverse":  # one layer changes its kind
            kinds = ["full_attention", "sliding_attention"]
            changed[key][0] = kinds[changed[key][0] == kinds[0]]
        elif value == "fewer":
            changed[key] = 1 if changed[key] > 1 else 2
        elif value == "theta":
            changed[key].get("full_attention", changed[key])["rope_theta"] = 123.0
        else:
            assert changed[key] != value, f"choose another value for {key}"
            changed[key] = value
            if key == "num_hidden_layers" and "layer_types" in changed:
                changed["layer_types"] = changed["layer_types"][:value]
        assert config_from_hf(changed, file) != base, f"{key} has no effect"


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "", None, 7, ["llama"]])
def test_unsupported_model_type(model_type):
    with pytest.raises(InputError, match="supported: llama, mistral, mixtral, qwen2"):
        config_from_hf({"model_type": model_type, **SIZES}, PATH)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64", None, [], 10**20])
def test_nonsensical_sizes(key, value):
    refused(f"{key} is {'None' if value is None else repr(value)}", "llama", **{key: value})


def test_missing_key():
    with pytest.raises(InputError, match="hidden_size is missing, but this model needs it"):
        config_from_hf({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != "hidden_size"}}, PATH)


BAD = {
    "num_key_value_heads is 3, which does not divide num_attention_heads, 8": dict(num_key_value_heads=3),
    "hidden_size is 65": dict(hidden_size=65),
    "head_dim is 7, but rotary embedding needs an even head size": dict(head_dim=7),
    "hidden_act is 'relu', supported: silu": dict(hidden_act="relu"),
    "hidden_act is ['silu']": dict(hidden_act=["silu"]),
    "rms_norm_eps is 0": dict(rms_norm_eps=0),
    "rms_norm_eps is nan": dict(rms_norm_eps=float("nan")),
    "attention_bias is 1, expected true or false": dict(attention_bias=1),
    "tie_word_embeddings is 'yes'": dict(tie_word_embeddings="yes"),
    "rope_theta is -1": dict(rope_theta=-1),
    "rope_theta is inf": dict(rope_theta=float("inf")),
    "rope_scaling is 4, expected a JSON object": dict(rope_scaling=4),
    "rope_type is 'longrope'; supported: default, linear, dynamic, yarn, llama3": dict(
        rope_scaling={"type": "longrope"}
    ),
    "rope_type is 3": dict(rope_scaling={"type": 3}),
    "factor is missing": dict(rope_scaling={"type": "linear"}),
    "factor is 0.5, expected at least 1": dict(rope_scaling={"type": "linear", "factor": 0.5}),
    "low_freq_factor is missing": dict(rope_scaling={"type": "llama3", "factor": 2}),
    "high_freq_factor is 1.0, expected more than low_freq_factor": dict(
        rope_scaling={"type": "llama3", "factor": 2, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
    ),
    "original_max_position_embeddings is 0": dict(
        rope_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}
    ),
    "partial_rotary_factor is 0.5": dict(partial_rotary_factor=0.5),
    "but only gemma3 may differ by layer type": dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
    "quantization_config is": dict(quantization_config={"quant_method": "awq"}),
    "num_hidden_layers is 5000, expected an integer from 1 to 4096": dict(num_hidden_layers=5000),
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_values_name_key_and_value(expected):
    refused(expected, "llama", **BAD[expected])


def test_bad_values_of_other_families():
    refused("use_bidirectional_attention is True", "gemma2", use_bidirectional_attention=True)
    refused("query_pre_attn_scalar is 0", "gemma2", query_pre_attn_scalar=0)
    refused("sliding_window is -4", "mistral", sliding_window=-4)
    refused("mlp_only_layers is 3", "qwen3_moe", mlp_only_layers=3)
    refused("rope_parameters is", "gemma3_text", rope_parameters={"full_attention": 3})
    with pytest.raises(InputError, match="text_config is 3"):
        config_from_hf({"model_type": "gemma3", "text_config": 3}, PATH)


def test_generation_defaults(tmp_path):
    def write(name: str, value: object) -> None:
        (tmp_path / name).write_text(value if isinstance(value, str) else json.dumps(value))

    assert generation_defaults(tmp_path) == ((), {})
    write("config.json", {"eos_token_id": 5})
    assert generation_defaults(tmp_path) == ((5,), {})
    write("generation_config.json", {"temperature": 0.7, "top_k": 20})
    assert generation_defaults(tmp_path) == ((5,), {})  # do_sample is not set
    sampling = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    write("generation_config.json", {"eos_token_id": [1, 2], "do_sample": True, **sampling})
    assert generation_defaults(tmp_path) == ((1, 2), sampling)
    for bad, expected in [
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"eos_token_id": [-1]}, r"eos_token_id is \[-1\]"),
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ("{", "generation_config.json: is not valid JSON"),
        ("[]", "holds a JSON list, expected an object"),
    ]:
        write("generation_config.json", bad)
        with pytest.raises(InputError, match=expected):
            generation_defaults(tmp_path)
