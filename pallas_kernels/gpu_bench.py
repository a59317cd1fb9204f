"""`scripts/bench_kernels.py --gpu`: check and time the cases on the GPU that is here, and the table of it."""

import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_measure, gpus
from pallas_kernels.case import Case, Kernel
from pallas_kernels.kernels import kernel as find

_THREADS = min(16, os.cpu_count() or 1)  # that compile at once
_WORTH = 0.97  # of the time with a kernel's own blocks: what others must be faster than to be in its table


class NoGpu(RuntimeError):
    """There is no GPU to run on."""


class Faulted(RuntimeError):
    """A kernel did what no program goes on after, such as to read what there is not."""


def device() -> dict[str, Any]:
    """Return what results are of: the device and the versions.

    Raises:
        NoGpu: JAX has none.
    """
    if jax.default_backend() != "gpu":
        raise NoGpu(f"--gpu: needs a GPU, and JAX has {jax.default_backend()!r}")
    kind = jax.devices()[0].device_kind
    versions = {name: sys.modules[name].__version__ for name in ("jax", "jaxlib") if name in sys.modules}
    return {"device": kind, "chip": getattr(gpus.of_kind(kind), "name", kind), "versions": versions}


def checks(names: Sequence[str], cases: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """Yield a line for each test case: whether the kernel is its reference on this device."""
    kernels = [find(name) for name in names]
    found = [(kernel, case) for kernel in kernels for case in (*kernel.tests, *kernel.gpu_tests)]
    found = [(kernel, case) for kernel, case in found if cases is None or case.name in cases]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(lambda job: _check(*job), found)


def _check(kernel: Kernel, case: Case) -> dict[str, Any]:
    line: dict[str, Any] = {"kernel": kernel.name, "case": case.name}
    try:
        return line | gpu_measure.check(kernel, case)
    except NotImplementedError as error:
        return line | {"unsupported": str(error)}
    except Exception as error:  # whatever goes wrong is the answer
        return line | {"ok": False, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


@dataclasses.dataclass(frozen=True)
class Timed:
    """What is timed: a case by an implementation, with blocks of its own where they are tried."""

    kernel: Kernel
    case: Case
    implementation: str
    run: Callable[..., Any]
    blocks: dict[str, int] | None = None
    prepare: Callable[..., Any] | None = None


def timed(names: Sequence[str], cases: Sequence[str] | None, peers: bool, tune: bool) -> list[Timed]:
    """Return what is to be timed: our kernels with their own blocks or every candidate's, and the peers."""
    found = []
    for name in names:
        kernel = find(name)
        for case in kernel.gpu_timed or kernel.timed:
            if cases is not None and case.name not in cases:
                continue
            tried = [dict(b) for b in kernel.gpu_candidates(case)] if tune and kernel.gpu_candidates else []
            for blocks in [None, *tried]:
                run = functools.partial(kernel.gpu, **case.options, blocks=blocks)
                found.append(Timed(kernel, case, "pallas", run, blocks))
            for peer, run in kernel.gpu_peers.items() if peers else ():
                found.append(_peer(kernel, case, peer, run))
    return found


def _peer(kernel: Kernel, case: Case, name: str, peer: Callable[..., Any]) -> Timed:
    case = dataclasses.replace(case, donated=())  # others' change nothing in place
    prepare = getattr(peer, "prepare", None)
    if prepare is None:
        return Timed(kernel, case, name, functools.partial(peer, **case.options))
    return Timed(kernel, case, name, peer.run, prepare=functools.partial(prepare, **case.options))


def times(jobs: Sequence[Timed], limits: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yield the line of each job: its time, or why there is none. All are compiled first, several at once.

    Raises:
        Faulted: one broke the device, of which this process gets nothing more; its line was yielded.
    """
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        compiled = list(pool.map(_compiled, jobs))
    for job, calls in zip(jobs, compiled, strict=True):
        line: dict[str, Any] = {"kernel": job.kernel.name, "case": job.case.name, "implementation": job.implementation}
        line |= {"blocks": job.blocks} if job.blocks else {}
        more = job.kernel.peer_bytes.get(job.implementation)
        try:
            if isinstance(calls, Exception):
                raise calls
            yield line | gpu_measure.measure(calls, limits, None if more is None else more(job.case))
        except Exception as error:  # a peer that can't do it, or a kernel that fails: the line says so
            yield line | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
            if not _lives():
                what = f"{job.kernel.name}, {job.case.name}, {job.blocks}"
                raise Faulted(f"{what}: the device faulted: {error}") from error


def _lives() -> bool:
    """Return whether the device still runs anything."""
    try:
        return bool(jnp.zeros(()) + 1)
    except jax.errors.JaxRuntimeError:
        return False


def _compiled(job: Timed) -> Any:
    try:
        return gpu_measure.compile_calls(job.run, job.case, job.prepare)
    except Exception as error:
        return error


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return timed lines as a Markdown table: our time, its share of the nearest limit, and others' times as ratios."""
    rows = ["| kernel | case | time | of the limit | others |", "|---|---|---:|---|---|"]
    lines = [x for x in lines if "implementation" in x]
    for place in dict.fromkeys((x["kernel"], x["case"]) for x in lines):
        here = [x for x in lines if (x["kernel"], x["case"]) == place]
        own = [x for x in here if x["implementation"] == "pallas"]
        best = min((x for x in own if "us" in x), key=lambda x: x["us"], default=None)
        if best is None:
            rows.append(f"| {' | '.join(place)} | {own[0].get('error', 'not run')[:60] if own else 'not run'} | | |")
            continue
        share, limit = max((best["bandwidth_share"], "copy bandwidth"), (best["flops_share"], "matmul rate"))
        others = [f"{x['implementation']} {x['us'] / best['us']:.2f}x" for x in here if x not in own and "us" in x]
        rows.append(f"| {' | '.join(place)} | {best['us']:.1f} us | {share:.0%} {limit} | {', '.join(others)} |")
    return "\n".join(rows)


def block_tables(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the table of each kernel, by file name: the fastest blocks of a case, where they beat the kernel's own."""
    found: dict[str, list[dict[str, Any]]] = {}
    own = [x for x in lines if x.get("implementation") == "pallas" and "us" in x]
    for chip, name, case in dict.fromkeys((x["chip"], x["kernel"], x["case"]) for x in own):
        here = [x for x in own if (x["chip"], x["kernel"], x["case"]) == (chip, name, case)]
        best = min(here, key=lambda x: x["us"])
        usual = min((x["us"] for x in here if "blocks" not in x), default=float("inf"))
        entries = found.setdefault(f"{name}_gpu.json", [])
        if "blocks" not in best or best["us"] > _WORTH * usual:
            continue
        kernel = find(name)
        (which,) = (c for c in kernel.gpu_timed or kernel.timed if c.name == case)
        shape = kernel.gpu_class(**which.shapes, **which.options)
        if all(entry["class"] != shape for entry in entries):
            blocks, us = best["blocks"], round(best["us"], 2)
            entries.append({"chip": chip, "case": case, "class": shape, "blocks": blocks, "us": us})
    return {name: "[\n" + ",\n".join(map(json.dumps, entries)) + "\n]\n" for name, entries in found.items()}


def main(args: Any) -> int:
    """Do what the script's `--gpu` says; return 1 where a check fails."""
    about = device()
    names, cases = args.kernels.split(","), args.cases.split(",") if args.cases else None
    out: Path | None = args.out
    lines: list[dict[str, Any]] = []

    def tell(line: dict[str, Any]) -> None:
        lines.append(line)
        print(json.dumps(line), flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(about | line) + "\n")

    wrong = 0
    for line in checks(names, cases) if not args.no_check else ():
        tell(line)
        wrong += not line.get("ok", True)
    if not args.check:
        limits = gpu_measure.ceilings()
        tell({"ceilings": limits})
        try:
            for line in times(timed(names, cases, not args.no_peers, args.tune), limits):
                tell(line)
        except Faulted as error:
            print(f"error: {' '.join(str(error).split())[:300]}; the cases after it were not run", file=sys.stderr)
            wrong += 1
        print(table(lines))
    return min(wrong, 1)
