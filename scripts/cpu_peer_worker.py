"""One implementation in a process of its own, for bench_cpu_peers.py: loads a GGUF file once, then answers requests.

    python scripts/cpu_peer_worker.py FILE IMPLEMENTATION DTYPE[+PASS...] THREADS

A request and an answer are a JSON line each: {"do": "prefill", "tokens": [...]} -> {"seconds": ..., ...}. Prefill ends
with the last token's logits; decode begins after the prompt, and its first token costs no forward pass.
"""

import json
import os
import sys
import time

CONTEXT = 2048
Timed = tuple[float, list[int]]  # seconds, tokens


class Jaxinfer:
    """The public path: `load`, a Session and its decode loop."""

    def __init__(self, path: str, dtype: str, threads: int):
        import jax

        import jaxinfer

        dtype, *passes = dtype.split("+")  # "float32+w8a8"
        self.program = jaxinfer.apply(jaxinfer.load(path, dtype=dtype), *passes)
        layouts = "+".join(self.program.layouts) or "separate"
        self.about = {"version": jaxinfer.__version__, "notes": f"jax {jax.__version__}, layout {layouts}"}

    def prefill(self, tokens: list[int]) -> Timed:
        import jax

        from jaxinfer.decode import loop

        begin = time.perf_counter()
        cache = loop.empty_cache(self.program.model, 1, loop.slots_for(len(tokens)))
        jax.block_until_ready(loop.prefill(self.program.model, cache, [tokens]))
        return time.perf_counter() - begin, []

    def decode(self, tokens: list[int], count: int) -> Timed:
        from jaxinfer import Session

        session, out = Session(self.program), []
        session.feed([tokens], room=count)
        time.sleep(0.05)  # the prompt's computation was only dispatched: let it end, so that it is not timed
        begin = time.perf_counter()
        for (new,) in session.decode(count, stop_ids=()):
            out += new
        return time.perf_counter() - begin, out


class LlamaCpp:
    """llama-cpp-python's low-level calls, without its sampler chain: the least that a greedy loop costs."""

    def __init__(self, path: str, dtype: str, threads: int):
        import llama_cpp

        self.llama = llama_cpp.Llama(
            path, n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
        )
        self.about = {"version": llama_cpp.__version__, "notes": "eval and argmax"}

    def _best(self) -> int:
        import numpy as np

        return int(np.ctypeslib.as_array(self.llama._ctx.get_logits(), shape=(self.llama.n_vocab(),)).argmax())

    def prefill(self, tokens: list[int]) -> Timed:
        self.llama.reset()
        begin = time.perf_counter()
        self.llama.eval(tokens)
        best = self._best()
        return time.perf_counter() - begin, [best]

    def decode(self, tokens: list[int], count: int) -> Timed:
        self.prefill(tokens)
        begin = time.perf_counter()
        out = [self._best()]
        while len(out) < count:
            self.llama.eval(out[-1:])
            out.append(self._best())
        return time.perf_counter() - begin, out


class Transformers:
    """The eager model; decode by `generate` or by a plain loop, whichever is faster in the warm-up."""

    def __init__(self, path: str, dtype: str, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        folder, file = os.path.split(os.path.abspath(path))
        self.torch, self.decode = torch, self._decode_fastest
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=getattr(torch, dtype)
        ).eval()
        self.about = {"version": transformers.__version__, "notes": f"torch {torch.__version__}"}

    def _forward(self, tokens: list[int], cache=None):
        with self.torch.inference_mode():
            ids = self.torch.tensor([tokens])
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return int(out.logits[0, -1].argmax()), out.past_key_values

    def prefill(self, tokens: list[int]) -> Timed:
        begin = time.perf_counter()
        best, _ = self._forward(tokens)
        return time.perf_counter() - begin, [best]

    def _decode_fastest(self, tokens: list[int], count: int) -> Timed:
        ways = {"plain loop": self._decode_loop, "generate": self._decode_generate}
        for way in ways.values():
            way(tokens, 8)
        found = {name: way(tokens, count) for name, way in ways.items()}
        fastest = min(found, key=lambda name: found[name][0])
        self.decode = ways[fastest]
        self.about["notes"] += f", decode by {fastest}"
        return found[fastest]

    def _decode_loop(self, tokens: list[int], count: int) -> Timed:
        best, cache = self._forward(tokens)
        begin, out = time.perf_counter(), [best]
        while len(out) < count:
            best, cache = self._forward(out[-1:], cache)
            out.append(best)
        return time.perf_counter() - begin, out

    def _decode_generate(self, tokens: list[int], count: int) -> Timed:
        ids = self.torch.tensor([tokens])

        def generate(new: int) -> Timed:
            begin = time.perf_counter()
            out = self.model.generate(
                ids, attention_mask=self.torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
            return time.perf_counter() - begin, out[0, len(tokens) :].tolist()

        prefill, _ = generate(1)
        seconds, out = generate(count)
        return seconds - prefill, out


KINDS = {"jaxinfer": Jaxinfer, "llama.cpp": LlamaCpp, "transformers": Transformers}


def work(path: str, implementation: str, dtype: str, threads: int) -> None:
    """Serve requests, a JSON line each, from stdin; answers go to the real stdout, everything else to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    runner = KINDS[implementation](path, dtype, threads)
    print(json.dumps(runner.about), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        seconds, tokens = getattr(runner, request.pop("do"))(**request)
        print(json.dumps({"seconds": seconds, "tokens": tokens, **runner.about}), file=answers)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
