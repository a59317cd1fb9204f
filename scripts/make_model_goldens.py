"""Write tests/goldens/models.json: what transformers computes with the real models that the tests run.

    python scripts/make_model_goldens.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --data ../shared/data

Needs the `peers` extra. For SmolLM2 (the GGUF file, dequantized to float32) and stories260K: the first 64 greedy tokens
after each of 8 prompts with the logit gap between the best two at each step, and the perplexity of WikiText-2's
validation text (first 20,000 tokens, windows of 512, the first token of each window is context only).
"""

import argparse
import json
import lzma
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEW_TOKENS, TOKENS, WINDOW = 64, 20_000, 512
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, there was a little girl who",
    "The three primary colors are",
    "Water boils at a temperature of",
    "In 1969, the first humans",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "El perro y el gato",
]


@torch.inference_mode()
def greedy(model, tokenizer, prompt: str) -> dict:
    """Return the prompt's ids, 64 greedy tokens and each one's lead over the runner-up in logits."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens, gaps, cache, step = [], [], None, ids
    for _ in range(NEW_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        best = out.logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        gaps.append(round(float(best.values[0] - best.values[1]), 5))
        step = best.indices[None, :1]
    return {"prompt": prompt, "ids": ids[0].tolist(), "tokens": tokens, "gaps": gaps}


@torch.inference_mode()
def perplexity(model, ids: list[int]) -> float:
    """Return exp of the mean negative log-likelihood over consecutive windows."""
    nats, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        if window.shape[1] < 2:
            break
        logits = model(window).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        count += window.shape[1] - 1
    return math.exp(nats / count)


def main(argv: list[str] | None = None) -> int:
    """Compute everything and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("tests/goldens/models.json"))
    args = parser.parse_args(argv)
    text = lzma.decompress((args.data / "wikitext2" / "valid.tokens.xz").read_bytes()).decode()
    goldens = {}
    for name, directory, options in (
        ("smollm2-135m", args.gguf.parent, {"gguf_file": args.gguf.name}),
        ("stories260K", args.data / "models" / "stories260K", {}),
    ):
        tokenizer = AutoTokenizer.from_pretrained(directory, **options)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options).eval()
        ids = tokenizer(text[:400_000]).input_ids[:TOKENS]
        goldens[name] = {
            "greedy": [greedy(model, tokenizer, prompt) for prompt in PROMPTS],
            "perplexity": perplexity(model, ids),
            "first_ids": ids[:32],
            "sum_of_ids": sum(ids),
        }
        print(name, goldens[name]["perplexity"])
    args.out.write_text(json.dumps(goldens) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
