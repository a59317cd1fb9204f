"""Write tests/goldens/<case>/: tiny random checkpoints and the logits and tokens that transformers computes for them.

Needs torch and transformers (`pip install jaxinfer[peers]`); run from the repository root:

    python scripts/make_goldens.py [case ...]

Weights are drawn wide and norms and biases away from their defaults, so that logits differ by units, and a swapped
kernel, a missed bias or a wrong rotation shows far above the tests' bound of 1e-4.
"""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
LENGTHS = (32, 20, 7)
NEW_TOKENS = 8
SEED = 1

BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    tie_word_embeddings=False,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
)
GEMMA = dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=6, tie_word_embeddings=True)
MOE = dict(num_experts_per_tok=2, output_router_logits=False)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=50.0, factor=4.0, original_max_position_embeddings=64, beta_fast=2.0, beta_slow=0.5
)  # a small theta and betas near one: the ramp between kept and stretched dimensions has several inside
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]

CASES = {
    "llama2": dict(model_type="llama", num_key_value_heads=4),
    "llama3": dict(model_type="llama", rope_parameters=LLAMA3),
    "llama_linear": dict(model_type="llama", rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0)),
    # Each row is longer than 16 tokens but the last, and each has its own stretch. Prefill only: transformers would
    # leave the keys that it has cached rotated for the shorter length.
    "llama_ntk": dict(
        model_type="llama",
        max_position_embeddings=16,
        rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0),
    ),
    "llama_yarn": dict(model_type="llama", head_dim=16, max_position_embeddings=256, rope_parameters=YARN),
    "llama_mqa": dict(model_type="llama", num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=8),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen2_window": dict(
        model_type="qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=6, layer_types=MIXED
    ),
    "qwen3": dict(model_type="qwen3", head_dim=16, num_key_value_heads=1),
    "gemma2": dict(
        model_type="gemma2", num_hidden_layers=3, attn_logit_softcapping=5.0, final_logit_softcapping=8.0, **GEMMA
    ),
    "gemma3_text": dict(
        model_type="gemma3_text",
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=1e6, factor=4.0),
            sliding_attention=dict(rope_type="default", rope_theta=100.0),
        ),
        **GEMMA,
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_hidden_layers=3, head_dim=8, num_experts=4, moe_intermediate_size=16,
        norm_topk_prob=True, mlp_only_layers=[1], **MOE,
    ),
    "mixtral": dict(model_type="mixtral", num_local_experts=4, intermediate_size=24, sliding_window=None, **MOE),
}  # fmt: skip


def build(case: str) -> torch.nn.Module:
    """Return the case's model with every parameter redrawn."""
    torch.manual_seed(SEED + sum(case.encode()))
    options = {**BASE, **CASES[case]}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:  # Gemma's are stored less one
                p.copy_((0.0 if "gemma" in config.model_type else 1.0) + 0.3 * torch.randn(p.shape))
            elif name.endswith("bias"):
                p.copy_(0.5 * torch.randn(p.shape))
            else:
                p.copy_(torch.randn(p.shape) * (1.0 if "embed" in name else 1.5) * p.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def expected(model: torch.nn.Module, generate: bool) -> dict[str, np.ndarray]:
    """Return the tokens, their logits row by row without padding, and the greedy continuation of each row."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(2, model.config.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=generator)
    logits = torch.zeros(*tokens.shape, model.config.vocab_size)
    greedy = []
    for row, length in enumerate(LENGTHS):
        tokens[row, length:] = 0
        fresh = copy.deepcopy(model)  # dynamic rotary frequencies would carry over from a longer row
        logits[row, :length] = fresh(tokens[row : row + 1, :length]).logits[0]
        if generate:
            out = fresh.generate(
                tokens[row : row + 1, :length],
                attention_mask=torch.ones(1, length, dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.cat(out.logits).topk(2).values
            assert (best[:, 0] - best[:, 1]).min() > 1e-3, f"row {row}: a near tie in the greedy path; change the seed"
            greedy.append(out.sequences[0, length:].numpy())
    found = {"tokens": tokens.numpy().astype(np.int32), "lengths": np.array(LENGTHS, np.int32)}
    found["logits"] = logits.numpy().astype(np.float32)
    if generate:
        found["greedy"] = np.stack(greedy).astype(np.int32)
        check_left_padded(model, tokens, logits)
    return found


def check_left_padded(model: torch.nn.Module, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Assert that transformers agrees with itself on one left-padded batch, so that the rows are a fair reference."""
    width = tokens.shape[1]
    ids, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        ids[row, width - length :], mask[row, width - length :] = tokens[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = copy.deepcopy(model)(ids, attention_mask=mask, position_ids=positions).logits
    for row, length in enumerate(LENGTHS):
        difference = (batch[row, width - length :] - logits[row, :length]).abs().max().item()
        assert difference < 2e-5, f"row {row}: left-padded logits differ by {difference}"


def main() -> None:
    for case in sys.argv[1:] or CASES:
        folder = GOLDENS / case
        model = build(case)
        found = expected(model, generate=case != "llama_ntk")
        model.save_pretrained(folder, safe_serialization=True)
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config.pop("_name_or_path", None)  # may hold a path of the machine that ran this
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        np.savez_compressed(folder / "expected.npz", **found)
        size = sum(file.stat().st_size for file in folder.iterdir())
        spread = found["logits"][0].std()
        print(
            f"{case:14s} {size / 1e3:6.1f} kB  logits spread {spread:5.2f}  most {np.abs(found['logits']).max():5.1f}"
        )


if __name__ == "__main__":
    main()
