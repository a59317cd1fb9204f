"""Compiling in another process, and whole programs from cuts of them."""

import collections
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.plan.hlo import Collective
from jaxinfer.plan.topology import Topology, environment

_ROOT = Path(__file__).resolve().parents[2]
_SUMS = ("arguments", "cache", "code", "flops", "bytes", "launches")  # what each further layer adds to
_SECONDS = ("trace_seconds", "compile_seconds", "processor_seconds")
_LIMIT = 3600  # seconds after which a compiler is stopped


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a whole program, per device; bytes are as the device lays arrays out."""

    layers: tuple[int, ...]  # how many each program that was compiled has
    whole: bool  # whether it is one program with all layers; else sums of cuts
    arguments: float | int
    cache: float | int
    temporaries: float | int
    code: float | int
    flops: float | int  # as XLA counts them: without kernels, and loops once
    bytes: float | int  # as XLA counts them: what its operations read and write, in VMEM too
    launches: float | int  # operations that run by themselves, and fusions
    trace_seconds: float | int  # of all programs; one compiles while another is traced
    compile_seconds: float | int
    processor_seconds: float | int  # of both, on all cores: what does not grow with the machine's other work
    kernels: Mapping[str, float | int] | None  # None, as are collectives, of a program that can't be read back
    collectives: Mapping[Collective, float | int] | None

    @property
    def weights(self) -> float | int:
        """Bytes of the arguments that are no cache."""
        return self.arguments - self.cache


def ask(
    request: Mapping[str, Any], topology: Topology, note: Callable[[str], object] = lambda _: None
) -> tuple[np.ndarray | None, dict[str, dict[str, Any]]]:
    """Return where a mesh's devices are and, by name, the answer for each job: numbers, or {"error": why}.

    `note` is told the name of each job that is done.

    Raises:
        InputError: the topology's compiler is not installed.
    """
    env = environment(topology)
    env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program for a device that is not there can't be stored
    places, answers = None, {}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as asked:
        json.dump(request, asked)
        asked.seek(0)
        command = [sys.executable, "-m", "jaxinfer.plan.worker"]
        process = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=errors, text=True, env=env)
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    answer = json.loads(line)
                    if "places" in answer:
                        places = np.array(answer["places"])
                    else:
                        answers[answer.pop("job")] = answer
                        note(answer.get("error", ""))
            process.wait(_LIMIT)
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        last = [text.strip() for text in errors.read().splitlines() if text.strip()][-1:]
    why = f"the compiler's process ended with status {process.returncode}" + (f": {last[0][:300]}" if last else "")
    for job in request["jobs"]:
        answers.setdefault(job["name"], {"error": why})
    return places, answers


def combine(answers: Sequence[Mapping[str, Any]], cuts: Sequence[tuple[tuple[int, ...], int]], whole: bool) -> Compiled:
    """Return the whole program of the answers for its cuts: each counts by its weight.

    Temporaries are those of the largest cut, since layers use the same ones after one another; seconds are summed.
    """
    weights = [weight for _, weight in cuts]

    def total(name: str) -> float | int:
        return sum(w * (a[name] or 0) for w, a in zip(weights, answers, strict=True))

    kernels: collections.Counter[str] = collections.Counter()
    collectives: collections.Counter[Collective] = collections.Counter()
    for weight, answer in zip(weights, answers, strict=True):
        for name, count in (answer["kernels"] or {}).items():
            kernels[name] += weight * count
        for kind, size, group, count in answer["collectives"] or ():
            collectives[Collective(kind, size, tuple(group))] += weight * count
    unread = any(answer["collectives"] is None for answer in answers)
    return Compiled(
        layers=tuple(len(layers) for layers, _ in cuts),
        whole=whole,
        **{name: total(name) for name in _SUMS},
        temporaries=max(a["temporaries"] for a in answers),
        **{name: sum(a[name] for a in answers) for name in _SECONDS},
        kernels=None if unread else {name: n for name, n in kernels.items() if n},
        collectives=None if unread else {c: n for c, n in collectives.items() if n},
    )
