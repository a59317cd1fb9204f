"""How good are a plan's times? Measurements, what a plan says of the same set-up, and the error of each.

    python scripts/plan_accuracy.py [--out accuracy.jsonl]

Published figures whose set-up is stated, with their source, and steps and prompts that we measured on an H100
(`benchmarks/results/step_h100.jsonl` and `bench_h100.jsonl`). A ratio below 1 says that the plan is optimistic. The
planner's share of HBM bandwidth (0.86) is that of one product of tokamax's on a v5e, its shares of attention on H100
and TPU7x are from the rows of cuDNN and splash: these two are no test. Nor is the H100's first bfloat16 step, which
says what a launch takes.
Throughputs of servers hold prompts too, and a plan's decode steps none.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxinfer.plan.counts import Work
from jaxinfer.plan.hardware import ATTAINED_BANDWIDTH, ATTAINED_FLOPS, HARDWARE
from jaxinfer.plan.planning import plan, tokens_per_second
from jaxinfer.plan.prediction import predict
from jaxinfer.plan.request import Request

MATMUL = "docs.jax.dev, pallas/tpu/matmul: wall time, some 0.11 ms of it dispatch"
TOKAMAX = "tokamax 0.0.12, data/autotuning"
JETSTREAM = (
    "github.com/AI-Hypercomputer/jetstream-pytorch, benchmarks/summary.md, 2024: serving ShareGPT, prompts included"
)
BOOK = "How to Scale Your Model, part 8: computed there, not measured; without network and repeated key heads"
STEPS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "step_h100.jsonl"
OURS = "benchmarks/results/step_h100.jsonl, by scripts/profile_gpu_step.py"
BENCHES = STEPS.with_name("bench_h100.jsonl")
BENCH = "benchmarks/results/bench_h100.jsonl, by jaxinfer bench"
TRAINED = 8192  # tokens: of Llama-3-8B
RPA = "arXiv 2604.15464: Llama-3-8B on TPU7x"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published figure and the plan's; `faster` where more is better."""

    what: str
    unit: str
    published: float
    planned: float
    source: str
    faster: bool = False

    @property
    def ratio(self) -> float:
        """Planned over published time, whichever way the figure is."""
        return self.published / self.planned if self.faster else self.planned / self.published


def products() -> list[Claim]:
    """Return products of square bfloat16 matrices on a v5e, in milliseconds."""
    measured = ((4096, "Pallas, blocks 512", 0.889), (8192, "Pallas, blocks 512", 6.099), (4096, "XLA", 0.827))
    return [
        Claim(f"v5e {n}^3 bf16, {how}", "ms", ms, _milliseconds("v5e", 3 * 2 * n * n, 2 * n**3), MATMUL)
        for n, how, ms in measured
    ]


def attentions() -> list[Claim]:
    """Return causal attention [32, 4096, 32 heads of 128, 8 key heads] in bfloat16, in milliseconds."""
    flops = 2 * 32 * 32 * 4096 * 4096 * 128
    size = 2 * 32 * 4096 * 128 * (2 * 32 + 2 * 8)
    measured = (("h100", "cuDNN", 6.82), ("h100", "Mosaic GPU", 7.19), ("tpu7x", "splash", 21.08))
    return [
        Claim(f"{chip} causal attention, {how}", "ms", ms, _milliseconds(chip, size, flops, attention=True), TOKAMAX)
        for chip, how, ms in measured
    ]


def _milliseconds(chip: str, size: float, flops: float, attention: bool = False) -> float:
    work = dict.fromkeys((f.name for f in dataclasses.fields(Work)), 0.0)
    work |= {"cache_bytes": size, "attention_flops": flops} if attention else {}
    work |= {} if attention else {"weight_bytes": size, "product_flops": flops}
    return 1e3 * predict(Work(**work), 0.0, HARDWARE[chip]).step


def servers() -> Iterator[Claim]:
    """Yield tokens a second of JetStream on a v5e-8; its int8 is of weights and cache."""
    measured = (
        ("llama3-8b", 128, (), 8249), ("llama3-8b", 256, ("int8", "kv_int8"), 10_873),
        ("llama2-7b", 96, (), 3663), ("llama2-7b", 96, ("int8", "kv_int8"), 4783),
        ("llama2-13b", 48, (), 2056), ("llama2-13b", 96, ("int8", "kv_int8"), 3458),
    )  # fmt: skip
    for model, batch, passes, rate in measured:
        asked = Request(
            model=model, topology="v5e:2x4", mesh="model=8", passes=passes, batch=batch, context=2048,
            phases=("decode",),
        )  # fmt: skip
        planned = 8 * tokens_per_second(plan(asked, compiling=False))
        what = f"{model} {'int8' if passes else 'bf16'} on v5e-8, batch {batch}, cache 2048"
        yield Claim(what, "tokens/s", rate, planned, JETSTREAM, faster=True)


def book() -> list[Claim]:
    """Return the book's frontier of Llama-3-70B in int8 on 4x4 v5e at 8,192 tokens, in milliseconds a token."""
    found = []
    for batch in (1, 8, 32):
        weights, cache = 70e9 / 16 / 8.2e11, batch * 8192 * 2 * 128 * 8 * 80 / 16 / 8.2e11
        published = 1e3 * (max(2 * 70e9 * batch / 16 / 1.97e14, weights) + cache)
        asked = Request(
            model="llama3-70b", topology="v5e:4x4", mesh="model=16", passes=("int8", "kv_int8"), batch=batch,
            phases=("decode",),
        )  # fmt: skip
        times = plan(asked, compiling=False).phases["decode"].times
        what = f"llama3-70b int8 on v5e 4x4, batch {batch}, 8192 tokens"
        found.append(Claim(f"{what}: roofline", "ms", published, 1e3 * times.roofline, BOOK))
        found.append(Claim(f"{what}: predicted", "ms", published, 1e3 * times.step, BOOK))
    return found


def steps() -> Iterator[Claim]:
    """Yield decode steps that we measured on an H100, in milliseconds: of a loop alone, and after prompts."""
    for line in map(json.loads, STEPS.read_text().splitlines()):
        yield _step(line, 64, OURS)
    for line in benches():
        yield _step(line, line["new_tokens"] // 2, BENCH)


def _step(line: dict[str, Any], more: int, source: str) -> Claim:
    """Return a decode step with `more` tokens than the prompt's in the cache, as many as the model was trained for."""
    asked = _asked(line, batch=line["batch"], context=min(line["context"] + more, TRAINED), phases=("decode",))
    times = plan(asked, compiling=False).phases["decode"].times
    return Claim(f"{_what(line)}: a step", "ms", line["step_ms"], 1e3 * times.step, source)


def prompts() -> Iterator[Claim]:
    """Yield prompts that we measured on an H100, in milliseconds a row."""
    for line in benches():
        asked = _asked(line, context=line["context"], phases=("prefill",))
        took = 1e3 * line["context"] / line["prefill_tokens_per_second"]
        yield Claim(f"{_what(line)}: a prompt", "ms", took, 1e3 * plan(asked, compiling=False).prefill.step, BENCH)


def benches() -> Iterator[dict[str, Any]]:
    """Yield our lines of `jaxinfer bench` on an H100, of contexts that the model was trained for."""
    for line in map(json.loads, BENCHES.read_text().splitlines()):
        if "step_ms" in line and "transformers" not in line["variant"] and line["context"] <= TRAINED:
            yield line


def _asked(line: dict[str, Any], **how: Any) -> Request:
    """Return what is planned of a line; its variant joins passes by a space, or by +."""
    passes = line["variant"].replace("+", " ").replace("baseline", "").split()
    return Request(model=line["model"], topology="h100:1", passes=tuple(passes), **how)


def _what(line: dict[str, Any]) -> str:
    variant = line["variant"].replace("baseline", "bf16")
    return f"{line['model']} {variant} on an H100, {line['batch']} x {line['context']}"


def shares() -> list[Claim]:
    """Return what ragged paged attention gets of a TPU7x's peaks, in percent."""
    return [
        Claim("share of HBM bandwidth in decode", "%", 86.0, 100 * ATTAINED_BANDWIDTH, RPA, faster=True),
        Claim("share of products' peak in prefill", "%", 73.0, 100 * ATTAINED_FLOPS, RPA, faster=True),
    ]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="also write a JSON line a claim")
    args = parser.parse_args(argv)
    claims = [*products(), *attentions(), *servers(), *steps(), *prompts(), *book(), *shares()]
    print("| what | measured | planned | planned / measured time | source |\n|---|---:|---:|---:|---|")
    for c in claims:
        print(f"| {c.what} | {c.published:.4g} {c.unit} | {c.planned:.4g} {c.unit} | {c.ratio:.2f} | {c.source} |")
    if args.out:
        lines = [json.dumps({**dataclasses.asdict(c), "ratio": round(c.ratio, 3)}) for c in claims]
        args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
