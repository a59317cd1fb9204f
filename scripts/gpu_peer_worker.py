"""Torch peers of `jaxinfer bench` on a GPU: transformers with sdpa, plain and compiled with a static cache.

    python scripts/gpu_peer_worker.py --model llama3-8b --batch 1 --batch 16 --context 1024 [--out FILE]

prints a JSON line for each of `transformers sdpa` and `transformers compiled`, and each batch and context: the same
architecture with random weights in bfloat16, greedy, no early stop, in the fields of jaxinfer bench. Decoding is a loop
of forward passes and argmax on the device, without `generate`'s bookkeeping. A workload that does not fit the memory
says so. --wait FILE waits for the file before it compiles and times, so that loading can go on beside other work. Needs
torch and transformers.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def make(name: str, device: str, tokens: int) -> Any:
    """Return a Llama of a published shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from jaxinfer.plan.shapes import find_shape

    c, _ = find_shape(name)
    config = LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.embed_dim, intermediate_size=c.mlp_dim, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, head_dim=c.head_dim,
        max_position_embeddings=max(c.max_context, tokens), rms_norm_eps=c.norm_eps,
        tie_word_embeddings=c.tie_embeddings, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.eval()


class Peer:
    """A model with a static cache, whose step is compiled or not."""

    def __init__(self, model: Any, batch: int, context: int, new_tokens: int, device: str, compiled: bool):
        import torch
        from transformers import StaticCache

        self.torch, self.model, self.device = torch, model, device
        self.batch, self.context, self.new_tokens = batch, context, new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=context + new_tokens)
        self.prompt = torch.randint(0, model.config.vocab_size, (batch, context), device=device)
        self.step: Callable[..., Any] = self._step
        if compiled:
            self.step = torch.compile(self._step, mode="reduce-overhead", fullgraph=True)

    def _step(self, token: Any, position: Any) -> Any:
        out = self.model(token, past_key_values=self.cache, cache_position=position, use_cache=True)
        return out.logits[:, -1:].argmax(-1)

    def round(self) -> tuple[float, float]:
        """Return the seconds of the prompt and of all new tokens but the first."""
        torch = self.torch
        with torch.no_grad():
            self.cache.reset()
            self._wait()
            begin = time.perf_counter()
            positions = torch.arange(self.context, device=self.device)
            out = self.model(
                self.prompt, past_key_values=self.cache, cache_position=positions, use_cache=True, logits_to_keep=1
            )
            token = out.logits[:, -1:].argmax(-1)
            self._wait()
            filled = time.perf_counter()
            position = torch.tensor([self.context], device=self.device)
            for _ in range(self.new_tokens - 1):
                token = self.step(token, position).clone()
                position = position + 1
            self._wait()
            return filled - begin, time.perf_counter() - filled

    def _wait(self) -> None:
        if self.device != "cpu":
            self.torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--batch", type=int, action="append", default=None, help="may be repeated; default 1")
    parser.add_argument("--context", type=int, action="append", default=None, help="may be repeated; default 1024")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peers", default="transformers sdpa,transformers compiled")
    parser.add_argument("--wait", type=Path, default=None, help="time nothing before this file is there")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    import torch
    import transformers

    contexts = args.context or [1024]
    model = make(args.model, args.device, max(contexts) + args.new_tokens)
    name = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    about = {"model": args.model, "random_weights": True, "device": name, "versions": versions}
    while args.wait is not None and not args.wait.exists():
        time.sleep(0.2)
    for context, batch, peer in itertools.product(contexts, args.batch or [1], args.peers.split(",")):
        sizes = {"batch": batch, "context": context, "new_tokens": args.new_tokens, "rounds": args.rounds}
        line = about | {"variant": peer, **sizes}
        try:
            line |= measure(
                Peer(model, batch, context, args.new_tokens, args.device, peer.endswith("compiled")), args.rounds
            )
        except torch.OutOfMemoryError as error:
            line |= {"error": " ".join(str(error).split())[:200]}
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
        torch.compiler.reset()  # and with it the buffers of its graphs
        if args.device != "cpu":
            torch.cuda.empty_cache()


def measure(peer: Peer, rounds: int) -> dict[str, float]:
    """Return a peer's speed: medians of rounds, after two that compile and warm up."""
    for _ in range(2):
        peer.round()
    prefill, decode = (statistics.median(x) for x in zip(*(peer.round() for _ in range(rounds)), strict=True))
    step = decode / (peer.new_tokens - 1)
    return {
        "step_ms": 1e3 * step,
        "decode_tokens_per_second": peer.batch / step,
        "prefill_tokens_per_second": peer.batch * peer.context / prefill,
    }


if __name__ == "__main__":
    main()
