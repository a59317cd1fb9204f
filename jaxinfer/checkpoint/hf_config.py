"""Read a Hugging Face config.json: the keys of every supported family, in old and transformers-5 spelling."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxinfer.checkpoint.hf_keys import REQUIRED, Keys, read_json
from jaxinfer.checkpoint.hf_rope import layer_type_ropes, rope_from_hf
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig, MoeConfig

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
MAX_LAYERS = 4096


@dataclasses.dataclass(frozen=True)
class _Family:
    """What transformers assumes for a family's missing keys. A size with no default here must be given."""

    name: str
    max_context: int
    kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    sliding_window: int | None = None
    theta: float = 10_000.0
    eps: float = 1e-6
    tie: bool = False
    final_softcap: float | None = None
    vocab_size: Any = REQUIRED
    heads: Any = REQUIRED


_GEMMA3 = _Family("gemma3", 131_072, 4, 256, 4096, 1_000_000.0, tie=True, vocab_size=262_208, heads=8)
FAMILIES = {
    "llama": _Family("llama", 2048),
    "mistral": _Family("mistral", 131_072, kv_heads=8, sliding_window=4096),
    "mixtral": _Family("mixtral", 131_072, kv_heads=8, theta=1_000_000.0, eps=1e-5),
    "qwen2": _Family("qwen2", 32_768, kv_heads=32, sliding_window=4096),
    "qwen3": _Family("qwen3", 32_768, kv_heads=32, head_dim=128, sliding_window=4096),
    "qwen3_moe": _Family("qwen3_moe", 32_768, kv_heads=4, sliding_window=4096),
    "gemma2": _Family("gemma2", 8192, kv_heads=4, head_dim=256, sliding_window=4096, tie=True, final_softcap=30.0),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
}


def config_from_hf(config: dict[str, Any], path: Path) -> ModelConfig:
    """Return the architecture that `config`, the parsed config.json at `path`, describes, as transformers reads it.

    Raises:
      InputError: the model type, rotary kind or activation is not supported, weights are quantized, or a key is
        missing, of the wrong type or makes no sense.
    """
    if not isinstance(config, dict):
        raise InputError(f"{path}: holds a JSON {type(config).__name__}, expected an object; fetch the file again")
    keys = Keys(config, path)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise keys.fail("model_type", f"supported: {', '.join(FAMILIES)}")
    if config.get("quantization_config") is not None:
        raise keys.fail("quantization_config", "but only unquantized safetensors can be read (or GGUF, quantized)")
    if kind == "gemma3":  # a multimodal checkpoint: run its language model
        # These real files leave out whatever has its default, so an absent text_config is one of defaults alone.
        text = dict(keys.object("text_config") or {})
        text.setdefault("tie_word_embeddings", config.get("tie_word_embeddings"))
        keys = Keys(text, path)
    return _model_config(FAMILIES[kind], keys)


def _model_config(f: _Family, keys: Keys) -> ModelConfig:
    gemma, qwen3 = f.name.startswith("gemma"), f.name.startswith("qwen3")
    D = keys.integer("hidden_size")
    N = keys.integer("num_attention_heads", f.heads)
    # An explicit null means as many as query heads, whatever the family's default.
    K = keys.integer("num_key_value_heads", N if "num_key_value_heads" in keys.values else f.kv_heads or N)
    if N % K:
        raise keys.fail("num_key_value_heads", f"which does not divide num_attention_heads, {N}")
    if keys.integer("head_dim", f.head_dim) is None and D % N:
        raise keys.fail("hidden_size", f"which num_attention_heads, {N}, does not divide, and head_dim is missing")
    H = keys.integer("head_dim", f.head_dim or D // N)
    if H % 2:
        raise keys.fail("head_dim", f"but rotary embedding needs an even head size, not {H}")
    L = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    max_context = keys.integer("max_position_embeddings", f.max_context)
    activation_key = "hidden_activation" if gemma else "hidden_act"
    activation = keys.get(activation_key, "gelu_pytorch_tanh" if gemma else "silu")
    if activation not in (ACTIVATIONS if isinstance(activation, str) else ()):
        raise keys.fail(activation_key, f"supported: {', '.join(ACTIVATIONS)}")
    if gemma and keys.flag("use_bidirectional_attention", False):
        raise keys.fail("use_bidirectional_attention", "but only causal attention is supported")
    moe = _moe(f, keys, L)
    # The others have a bias never, or (Qwen2) always on q, k and v alone.
    attention_bias = keys.flag("attention_bias", False) if f.name == "llama" or gemma or qwen3 else False
    if f.name == "gemma3":
        rope, rope_local = layer_type_ropes(keys, f.theta, max_context)
    else:
        rope, rope_local = rope_from_hf(keys, f.theta, max_context), None
        if rope.kind in ("linear", "ntk"):
            # transformers documents max_position_embeddings as the trained context here, to be left as it was.
            max_context = int(max_context * rope.factor)
    return ModelConfig(
        family=f.name,
        vocab_size=keys.integer("vocab_size", f.vocab_size),
        embed_dim=D,
        mlp_dim=keys.integer("intermediate_size"),
        num_layers=L,
        num_heads=N,
        num_kv_heads=K,
        head_dim=H,
        max_context=max_context,
        norm_eps=keys.number("rms_norm_eps", f.eps),
        activation=ACTIVATIONS[activation],
        rope=rope,
        rope_local=rope_local,
        windows=_windows(f, keys, L),
        qkv_bias=attention_bias or f.name == "qwen2",
        out_bias=attention_bias,
        mlp_bias=keys.flag("mlp_bias", False) if f.name == "llama" else False,
        qk_norm=qwen3 or f.name == "gemma3",
        post_norms=gemma,
        embed_scale=D**0.5 if gemma else 1.0,
        attention_scale=keys.number("query_pre_attn_scalar", 256.0) ** -0.5 if gemma else None,
        # Gemma 3 has the attention key too, but transformers never applies it there.
        attention_softcap=_softcap(keys, "attn_logit_softcapping", 50.0) if f.name == "gemma2" else None,
        final_softcap=_softcap(keys, "final_logit_softcapping", f.final_softcap) if gemma else None,
        tie_embeddings=keys.flag("tie_word_embeddings", f.tie),
        moe=moe,
    )


def _softcap(keys: Keys, key: str, default: float | None) -> float | None:
    """Return the cap; here an explicit null means none, where a missing key means the default."""
    return None if key in keys.values and keys.values[key] is None else keys.number(key, default)


def _moe(f: _Family, keys: Keys, num_layers: int) -> MoeConfig | None:
    if f.name == "mixtral":
        layers, normalize = None, True
        size = keys.integer("intermediate_size")
        experts_key, default_experts, default_k = "num_local_experts", 8, 2
    elif f.name == "qwen3_moe":
        layers, normalize = _sparse_layers(keys, num_layers), keys.flag("norm_topk_prob", False)
        size = keys.integer("moe_intermediate_size", 768)
        # transformers 5 reads and writes Mixtral's name for it too.
        experts_key = "num_experts" if "num_experts" in keys.values else "num_local_experts"
        default_experts, default_k = 128, 8
    else:
        return None
    experts = keys.integer(experts_key, default_experts, low=0 if f.name == "qwen3_moe" else 1)
    k = keys.integer("num_experts_per_tok", default_k)
    if experts == 0 or layers == ():
        return None
    if k > experts:
        raise keys.fail("num_experts_per_tok", f"which is more than {experts_key}, {experts}")
    return MoeConfig(
        num_experts=experts, experts_per_token=k, expert_dim=size, normalize_weights=normalize, layers=layers
    )


def _sparse_layers(keys: Keys, num_layers: int) -> tuple[int, ...] | None:
    step = keys.integer("decoder_sparse_step", 1)
    dense = keys.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise keys.fail("mlp_only_layers", "expected a list of layer numbers")
    sparse = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % step == 0)
    return None if len(sparse) == num_layers else sparse


def _windows(f: _Family, keys: Keys, num_layers: int) -> tuple[int | None, ...]:
    """Return the window of each layer, or () where no layer has one."""
    window = f.sliding_window if "sliding_window" not in keys.values else keys.integer("sliding_window", None)
    if f.name.startswith("qwen") and not keys.flag("use_sliding_window", False):
        window = None
    match f.name:
        case "llama":
            return ()
        case "mistral" | "mixtral" | "qwen3_moe":
            local = [window is not None] * num_layers
        case "qwen2" | "qwen3":
            first = keys.integer("max_window_layers", 28, low=0)
            local = _local_layers(keys, [window is not None and i >= first for i in range(num_layers)])
        case "gemma2":
            local = _local_layers(keys, [i % 2 == 0 for i in range(num_layers)])
        case "gemma3":
            period = keys.integer("sliding_window_pattern", 6)
            local = _local_layers(keys, [(i + 1) % period != 0 for i in range(num_layers)])
    if any(local) and window is None:
        raise keys.fail("sliding_window", "but layer_types gives some layers sliding_attention")
    return tuple(window if is_local else None for is_local in local) if any(local) else ()


def _local_layers(keys: Keys, default: list[bool]) -> list[bool]:
    kinds = keys.get("layer_types", None)
    if kinds is None:
        return default
    known = {"sliding_attention": True, "full_attention": False}
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in known for kind in kinds):
        raise keys.fail("layer_types", f"expected a list of {' and '.join(known)}")
    if len(kinds) != len(default):
        raise keys.fail("layer_types", f"expected one for each of the {len(default)} layers")
    return [known[kind] for kind in kinds]


def generation_defaults(directory: Path) -> tuple[tuple[int, ...], dict[str, float]]:
    """Return the stop tokens and the recommended sampling of the checkpoint in `directory`.

    Both come from generation_config.json; stop tokens fall back to config.json's. Sampling is empty (greedy) unless
    the file sets do_sample.

    Raises:
      InputError: a file is not a JSON object, or a value has the wrong type or range.
    """
    directory = Path(directory)
    file, config = directory / "generation_config.json", directory / "config.json"
    generation = Keys(read_json(file) if file.exists() else {}, file)
    stop = _token_ids(generation)
    if not stop and config.exists():
        stop = _token_ids(Keys(read_json(config), config))
    sampling: dict[str, float] = {}
    if generation.flag("do_sample", False):
        temperature, top_p = generation.number("temperature", None), generation.number("top_p", None)
        top_k = generation.integer("top_k", None, low=0)
        if top_p is not None and top_p > 1:
            raise generation.fail("top_p", "expected a probability, at most 1")
        found = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        sampling = {key: value for key, value in found.items() if value is not None}
    return stop, sampling


def _token_ids(keys: Keys) -> tuple[int, ...]:
    ids = keys.get("eos_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise keys.fail("eos_token_id", "expected a token number or a list of them")
    return tuple(ids)
