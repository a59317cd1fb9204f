"""Name tables: how the tensors of each checkpoint format map to the leaves of the model, as data.

A `Rule` pairs a stored name with a leaf path. Both are patterns: `{i}` stands for the layer and, on the stored side
only, `{e}` for an expert: such a rule gathers one stored tensor for each entry of the leaf's first axis. Several rules
may lead to one leaf: they are the known spellings of it, and the first one that a checkpoint has is taken.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Iterable

import numpy as np

from jaxinfer.models.config import ModelConfig

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """From a stored array to a leaf's layout (one expert's slice of it where the rule has `{e}`).

    `stored` gives the shape that the file must hold for a leaf of the given shape, so that shapes are checked from
    headers alone; `apply` takes the stored array and the leaf's shape, and may return a view. `rows`, where the file
    has a row for each output, brings these rows (of whatever they consist) into the order of a leaf that is stored
    outputs first, and takes that leaf's shape.
    """

    stored: Callable[[Shape], Shape]
    apply: Callable[[np.ndarray, Shape], np.ndarray]
    rows: Callable[[np.ndarray, Shape], np.ndarray] | None = None


def _unpermute_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's interleaving of rotary pairs: row 2j+p of a head came from row p*H/2+j of the original."""
    half = w.shape[0] // heads // 2
    return w.reshape(heads, half, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def _rows_to_heads(w: np.ndarray, leaf: Shape) -> np.ndarray:
    return w.T.reshape(leaf)


def _as_it_is(w: np.ndarray, leaf: Shape) -> np.ndarray:
    return w


SAME = Transform(lambda s: s, _as_it_is, _as_it_is)
# Gemma multiplies by (1 + w); the sum is taken in float32, so bfloat16 storage loses nothing.
ONE_PLUS = Transform(lambda s: s, lambda w, s: w.astype(np.float32) + 1.0)
TRANSPOSE = Transform(lambda s: s[::-1], lambda w, s: w.T, _as_it_is)  # [out, in] -> [in, out]
HEADS_OUT = Transform(lambda s: (s[1] * s[2], s[0]), _rows_to_heads, _as_it_is)  # [N*H, D] -> [D, N, H]
HEADS_IN = Transform(lambda s: (s[2], s[0] * s[1]), _rows_to_heads, _as_it_is)  # [D, N*H] -> [N, H, D]
HEADS_BIAS = Transform(lambda s: (s[0] * s[1],), lambda w, s: w.reshape(s))  # [N*H] -> [N, H]
ROTARY_HEADS_OUT = Transform(
    HEADS_OUT.stored,
    lambda w, s: _rows_to_heads(_unpermute_rows(w, s[1]), s),
    lambda w, s: _unpermute_rows(w, s[0]),
)
ROTARY_HEADS_BIAS = Transform(HEADS_BIAS.stored, lambda w, s: _unpermute_rows(w, s[0]).reshape(s))
EXPERTS = Transform(
    lambda s: (s[0], s[2], s[1]), lambda w, s: w.swapaxes(1, 2), _as_it_is
)  # [E, out, in] -> [E, in, out]
# One stored [E, 2F, D] holds the gate's rows, then the up projection's.
EXPERTS_GATE_HALF = Transform(lambda s: (s[0], 2 * s[2], s[1]), lambda w, s: w[:, : s[2]].swapaxes(1, 2))
EXPERTS_UP_HALF = Transform(lambda s: (s[0], 2 * s[2], s[1]), lambda w, s: w[:, s[2] :].swapaxes(1, 2))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The stored tensor `pattern` becomes the leaf `path` through `transform`."""

    pattern: str
    path: str
    transform: Transform = SAME


@dataclasses.dataclass(frozen=True)
class NameTable:
    """A format's rules for one model, what it may hold besides (`ignored`, with `*`), and equivalent prefixes."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]
    prefixes: tuple[tuple[str, str], ...] = ()

    def canonical(self, name: str) -> str:
        """Return `name` with the first matching prefix replaced by the one that the rules use."""
        for stored, plain in self.prefixes:
            if name.startswith(stored):
                return plain + name[len(stored) :]
        return name

    def is_ignored(self, name: str) -> bool:
        """Return whether the canonical `name` is known and has no place in the model."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.ignored)


def _layer(rules: Iterable[tuple[str, str, Transform]], stored: str) -> tuple[Rule, ...]:
    return tuple(Rule(stored + name, "layers.{i}." + path, transform) for name, path, transform in rules)


def hf_names(config: ModelConfig) -> NameTable:
    """Return the table for Hugging Face checkpoints of `config`'s family."""
    norm = ONE_PLUS if config.family.startswith("gemma") else SAME
    if config.post_norms:
        norms = [
            ("post_attention_layernorm.weight", "attention_post_norm.scale", norm),
            ("pre_feedforward_layernorm.weight", "mlp_norm.scale", norm),
            ("post_feedforward_layernorm.weight", "mlp_post_norm.scale", norm),
        ]
    else:
        norms = [("post_attention_layernorm.weight", "mlp_norm.scale", norm)]
    layer = [
        ("input_layernorm.weight", "attention_norm.scale", norm),
        *norms,
        ("self_attn.q_proj.weight", "attention.qkv.q.kernel", HEADS_OUT),
        ("self_attn.k_proj.weight", "attention.qkv.k.kernel", HEADS_OUT),
        ("self_attn.v_proj.weight", "attention.qkv.v.kernel", HEADS_OUT),
        ("self_attn.o_proj.weight", "attention.o.kernel", HEADS_IN),
        ("self_attn.q_proj.bias", "attention.qkv.q.bias", HEADS_BIAS),
        ("self_attn.k_proj.bias", "attention.qkv.k.bias", HEADS_BIAS),
        ("self_attn.v_proj.bias", "attention.qkv.v.bias", HEADS_BIAS),
        ("self_attn.o_proj.bias", "attention.o.bias", SAME),
        ("self_attn.q_norm.weight", "attention.q_norm.scale", norm),
        ("self_attn.k_norm.weight", "attention.k_norm.scale", norm),
        ("mlp.gate_proj.weight", "mlp.gate_up.gate.kernel", TRANSPOSE),
        ("mlp.up_proj.weight", "mlp.gate_up.up.kernel", TRANSPOSE),
        ("mlp.down_proj.weight", "mlp.down.kernel", TRANSPOSE),
        ("mlp.gate_proj.bias", "mlp.gate_up.gate.bias", SAME),
        ("mlp.up_proj.bias", "mlp.gate_up.up.bias", SAME),
        ("mlp.down_proj.bias", "mlp.down.bias", SAME),
        # Qwen3-MoE; then Mixtral's own names; then the fused form in which transformers 5 holds both.
        ("mlp.gate.weight", "mlp.router.kernel", TRANSPOSE),
        ("mlp.experts.{e}.gate_proj.weight", "mlp.gate.kernel", TRANSPOSE),
        ("mlp.experts.{e}.up_proj.weight", "mlp.up.kernel", TRANSPOSE),
        ("mlp.experts.{e}.down_proj.weight", "mlp.down.kernel", TRANSPOSE),
        ("block_sparse_moe.gate.weight", "mlp.router.kernel", TRANSPOSE),
        ("block_sparse_moe.experts.{e}.w1.weight", "mlp.gate.kernel", TRANSPOSE),
        ("block_sparse_moe.experts.{e}.w3.weight", "mlp.up.kernel", TRANSPOSE),
        ("block_sparse_moe.experts.{e}.w2.weight", "mlp.down.kernel", TRANSPOSE),
        ("mlp.experts.gate_up_proj", "mlp.gate.kernel", EXPERTS_GATE_HALF),
        ("mlp.experts.gate_up_proj", "mlp.up.kernel", EXPERTS_UP_HALF),
        ("mlp.experts.down_proj", "mlp.down.kernel", EXPERTS),
    ]
    rules = (
        Rule("model.embed_tokens.weight", "embed.table"),
        Rule("model.norm.weight", "final_norm.scale", norm),
        Rule("lm_head.weight", "unembed.kernel"),
        *_layer(layer, "model.layers.{i}."),
    )
    ignored = (
        "model.layers.*.self_attn.rotary_emb.inv_freq",  # recomputed from the config; saved by old transformers
        "model.rotary_emb.inv_freq",
        # The image half of a multimodal Gemma 3: only its language model is run.
        "vision_tower.*",
        "multi_modal_projector.*",
        "model.vision_tower.*",
        "model.multi_modal_projector.*",
    )
    if config.tie_embeddings:
        ignored += ("lm_head.weight",)
    prefixes = (
        ("model.language_model.", "model."),  # Gemma 3 as transformers 4.52 and later saves it
        ("language_model.model.", "model."),  # and as the Hub holds it
        ("language_model.lm_head.", "lm_head."),
    )
    return NameTable(rules, ignored, prefixes)


def gguf_names(config: ModelConfig) -> NameTable:
    """Return the table for GGUF files of `config`'s family. Gemma's norms are stored with the one already added."""
    # Only files of llama.cpp's "llama" architecture interleave the rotary pairs of q and k.
    interleaved = config.family in ("llama", "mistral", "mixtral")
    rotary, rotary_bias = (ROTARY_HEADS_OUT, ROTARY_HEADS_BIAS) if interleaved else (HEADS_OUT, HEADS_BIAS)
    layer = [
        ("attn_norm.weight", "attention_norm.scale", SAME),
        ("ffn_norm.weight", "mlp_norm.scale", SAME),
        ("post_attention_norm.weight", "attention_post_norm.scale", SAME),
        ("post_ffw_norm.weight", "mlp_post_norm.scale", SAME),
        ("attn_q.weight", "attention.qkv.q.kernel", rotary),
        ("attn_k.weight", "attention.qkv.k.kernel", rotary),
        ("attn_v.weight", "attention.qkv.v.kernel", HEADS_OUT),
        ("attn_output.weight", "attention.o.kernel", HEADS_IN),
        ("attn_q.bias", "attention.qkv.q.bias", rotary_bias),
        ("attn_k.bias", "attention.qkv.k.bias", rotary_bias),
        ("attn_v.bias", "attention.qkv.v.bias", HEADS_BIAS),
        ("attn_output.bias", "attention.o.bias", SAME),
        ("attn_q_norm.weight", "attention.q_norm.scale", SAME),
        ("attn_k_norm.weight", "attention.k_norm.scale", SAME),
        ("ffn_gate.weight", "mlp.gate_up.gate.kernel", TRANSPOSE),
        ("ffn_up.weight", "mlp.gate_up.up.kernel", TRANSPOSE),
        ("ffn_down.weight", "mlp.down.kernel", TRANSPOSE),
        ("ffn_gate.bias", "mlp.gate_up.gate.bias", SAME),
        ("ffn_up.bias", "mlp.gate_up.up.bias", SAME),
        ("ffn_down.bias", "mlp.down.bias", SAME),
        ("ffn_gate_inp.weight", "mlp.router.kernel", TRANSPOSE),
        ("ffn_gate_exps.weight", "mlp.gate.kernel", EXPERTS),
        ("ffn_up_exps.weight", "mlp.up.kernel", EXPERTS),
        ("ffn_down_exps.weight", "mlp.down.kernel", EXPERTS),
        # Mixtral files from before llama.cpp stacked the experts.
        ("ffn_gate.{e}.weight", "mlp.gate.kernel", TRANSPOSE),
        ("ffn_up.{e}.weight", "mlp.up.kernel", TRANSPOSE),
        ("ffn_down.{e}.weight", "mlp.down.kernel", TRANSPOSE),
    ]
    rules = (
        Rule("token_embd.weight", "embed.table"),
        Rule("output_norm.weight", "final_norm.scale"),
        Rule("output.weight", "unembed.kernel"),
        *_layer(layer, "blk.{i}."),
    )
    # rope_freqs holds Llama 3's per-frequency factors; the config reader decides what they mean.
    ignored = ("rope_freqs.weight", "blk.*.attn_rot_embd.weight")
    return NameTable(rules, ignored)
