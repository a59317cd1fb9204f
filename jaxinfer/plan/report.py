"""A plan as one JSON object, and as text for people."""

import collections
from typing import Any

from jaxinfer.plan.alternatives import Alternative
from jaxinfer.plan.hlo import Collective
from jaxinfer.plan.planning import Phase, Plan, tokens_per_second
from jaxinfer.plan.prediction import Times
from jaxinfer.plan.speculation import Speculation, check_step
from jaxinfer.sharding.mesh import show_mesh

GB = 1e9
_MUCH_MORE = 3  # times the bytes that a step must move


def to_json(plan: Plan, nearby: list[Alternative], speculation: Speculation | None) -> dict[str, Any]:
    """Return a plan as JSON types: bytes, FLOPs and seconds of one device."""
    request, memory, target = plan.request, plan.memory, plan.target
    hardware = target.topology.hardware
    return {
        "model": request.model,
        "passes": list(request.passes),
        "dtype": request.dtype,
        "topology": target.topology.name,
        "chips": target.topology.chips,
        "devices": target.topology.devices,
        "mesh": show_mesh(target.sizes),
        "rules": request.rules,
        "batch": request.batch,
        "context": request.context,
        "memory": {
            "weights": memory.weights, "cache": memory.cache, "temporaries": memory.temporaries, "code": memory.code,
            "total": memory.total, "usable": memory.usable, "free": memory.free, "fits": memory.fits,
            "estimated": memory.estimated,
        },
        "alternatives": [{"change": a.change, "free": a.free} for a in nearby],
        "phases": {name: _phase_json(phase) for name, phase in plan.phases.items()},
        "prompt": None if plan.prefill is None else {"tokens": target.prompt, **_times_json(plan.prefill)},
        "speculation": None if speculation is None else _speculation_json(plan, speculation),
        "tokens_per_second_per_chip": tokens_per_second(plan),
        "peaks": None if hardware is None else {
            "bandwidth": hardware.bandwidth, "flops": hardware.flops, "int8": hardware.int8, "link": hardware.link,
        },
        "seconds": round(plan.seconds, 2),
    }  # fmt: skip


def _phase_json(phase: Phase) -> dict[str, Any]:
    work, compiled = phase.work, phase.compiled
    out = {
        "rows": phase.rows,
        "tokens": phase.tokens,
        "turns": {"stages": phase.turns.stages, "pieces": phase.turns.pieces, "count": phase.turns.count},
        "bytes": {"weights": work.weight_bytes, "cache": work.cache_bytes, "activations": work.activation_bytes},
        "flops": {"products": work.product_flops, "int8": work.integer_flops, "attention": work.attention_flops},
        "collectives": [
            {"kind": c.kind, "bytes": c.bytes, "devices": len(c.group), "count": n}
            for c, n in phase.collectives.items()
        ],
        "times": None if phase.times is None else _times_json(phase.times),
        "compiled": None,
        "error": phase.error,
    }
    if compiled is not None:
        out["compiled"] = {
            "layers": list(compiled.layers), "whole": compiled.whole, "flops": compiled.flops, "bytes": compiled.bytes,
            "temporaries": compiled.temporaries, "kernels": compiled.kernels,
            "trace_seconds": compiled.trace_seconds, "compile_seconds": compiled.compile_seconds,
            "processor_seconds": compiled.processor_seconds,
        }  # fmt: skip
    return out


def _times_json(times: Times) -> dict[str, Any]:
    return {
        "step": times.step, "limit": times.limit, "roofline": times.roofline, "memory": times.memory,
        "products": times.products, "network": times.network, "launches": times.launches,
    }  # fmt: skip


def _speculation_json(plan: Plan, speculation: Speculation) -> dict[str, Any] | None:
    times = check_step(plan, speculation)
    if times is None:
        return None
    plain, a_token = plan.phases["decode"].times.step, times.step / speculation.tokens
    return {"check": times.step, "tokens_per_check": speculation.tokens, "step": a_token, "speedup": plain / a_token}


def to_text(plan: Plan, nearby: list[Alternative], speculation: Speculation | None) -> str:
    """Return what a plan says, for a terminal."""
    request, target = plan.request, plan.target
    passes = " ".join(request.passes) or request.dtype
    devices = "" if target.topology.devices == target.topology.chips else f" ({target.topology.devices} devices)"
    lines = [
        f"{request.model} ({passes}) on {target.topology.name}, {target.topology.chips} chips{devices}, mesh "
        f"{show_mesh(target.sizes)}, rules {request.rules}; {request.batch} rows of {request.context} tokens",
        "",
        *_memory_lines(plan, nearby),
    ]
    for name, phase in plan.phases.items():
        lines += ["", *_phase_lines(plan, name, phase)]
    if speculation is not None and "decode" in plan.phases:
        lines += ["", *_speculation_lines(plan, speculation)]
    return "\n".join([*lines, "", f"planned in {plan.seconds:.1f} s; times are predictions, no device has run them"])


def _memory_lines(plan: Plan, nearby: list[Alternative]) -> list[str]:
    memory = plan.memory
    parts = [("weights", memory.weights), ("KV cache", memory.cache)]
    if not memory.estimated:
        parts += [("temporaries", memory.temporaries), ("program", memory.code)]
    text = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts)
    head = f"HBM per device, GB: {text}; {memory.total / GB:.2f}"
    if memory.usable is None:
        return [head]
    lines = [f"{head} of {memory.usable / GB:.2f} that a program can have, free {memory.free / GB:.2f}"]
    if memory.estimated:
        lines.append(
            "  (nothing was compiled: weights and cache by their shapes, temporaries and the program left out)"
        )
    if memory.fits:
        return lines
    lines.append(f"DOES NOT FIT, by {-memory.free / GB:.2f} GB per device" + (". What fits:" if nearby else ""))
    return lines + [f"  {a.change}   (leaves {a.free / GB:.2f} GB)" for a in nearby]


def _phase_lines(plan: Plan, name: str, phase: Phase) -> list[str]:
    work = phase.work
    rows = f"{phase.rows} row{'s' * (phase.rows > 1)}"
    what = f"{rows} by a token" if name == "decode" else f"{rows} by a chunk of {phase.tokens} tokens, the last one"
    lines = [
        f"{name}: {what}",
        *_turns_lines(phase),
        f"  per device: {work.bytes / GB:.3f} GB (weights {work.weight_bytes / GB:.3f}, cache "
        f"{work.cache_bytes / GB:.3f}, activations {work.activation_bytes / GB:.3f}), {work.flops / GB:.1f} GFLOP"
        f" (attention {work.attention_flops / GB:.1f})",
        f"  collectives: {collectives_text(phase.collectives)}" + (" (estimated)" if phase.estimated else ""),
    ]
    if phase.times is not None:
        t = phase.times
        launches = f", {phase.launches:g} launches {1e3 * t.launches:.2f}" if t.launches else ""
        lines.append(
            f"  predicted {1e3 * t.step:.2f} ms, most of it {t.limit} (HBM {1e3 * t.memory:.2f}, products "
            f"{1e3 * t.products:.2f}, network {1e3 * t.network:.2f}{launches}); roofline {1e3 * t.roofline:.2f} ms"
        )
    if name == "decode" and phase.times is not None:
        lines.append(f"  {tokens_per_second(plan):.1f} tokens/s per chip, {1 / phase.times.step:.1f} tokens/s per row")
    if name == "prefill" and plan.prefill is not None:
        total = plan.request.prompt or plan.request.context
        lines.append(
            f"  a prompt of {total} tokens: {1e3 * plan.prefill.step:.0f} ms, most of it {plan.prefill.limit}; "
            f"{phase.rows * total / plan.prefill.step / plan.target.topology.chips:.0f} tokens/s per chip"
        )
    return [*lines, "  " + compiled_text(phase), *_traffic(phase)]


def _turns_lines(phase: Phase) -> list[str]:
    """Return how a step goes through stages, where there are any."""
    stages, pieces, count = phase.turns.stages, phase.turns.pieces, phase.turns.count
    if stages == 1:
        return []
    cut = f"in {pieces} pieces of {phase.tokens // pieces} tokens, " if pieces > 1 else ""
    works = f"of which a device works in {pieces} ({pieces / count:.0%})"
    return [f"  {cut}through {stages} stages in {count} turns, {works}"]


def _traffic(phase: Phase) -> list[str]:
    """Return a warning where XLA moves far more than must be read: it is not in the predicted time."""
    if phase.compiled is None:
        return []
    times = phase.compiled.bytes / (phase.work.bytes / phase.turns.pieces)  # XLA counts one turn of all
    if times < _MUCH_MORE:
        return []
    return [f"  beware: XLA counts {times:.1f} times these bytes, to and from HBM and VMEM; expect it to be slower"]


def compiled_text(phase: Phase) -> str:
    """Return what was compiled and how long it took, or why it was not."""
    if phase.error is not None:
        return f"not compiled: {phase.error}"
    c = phase.compiled
    if c is None:
        return "not compiled"
    if c.kernels is None:
        kernels = "not known, this jaxlib can't read the program that the compiler made"
    else:
        kernels = ", ".join(f"{name} x{n:g}" for name, n in c.kernels.items()) or "none, all of it is XLA's"
    each = " of each stage" if phase.turns.stages > 1 else ""
    how = "all layers as one program" if c.whole else f"cuts of {' and '.join(map(str, c.layers))} layers{each}, scaled"
    seconds = f"{c.processor_seconds:.1f} s of processors"
    return f"compiled in {seconds} ({how}); kernels: {kernels}"


def collectives_text(collectives: dict[Collective, float | int]) -> str:
    """Return collectives by kind: how many, and the bytes of them all."""
    sizes: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for c, n in collectives.items():
        sizes[c.kind] += n * c.bytes
        counts[c.kind] += n
    return ", ".join(f"{counts[k]:g} {k} of {sizes[k] / GB:.3f} GB" for k in sizes) or "none"


def _speculation_lines(plan: Plan, speculation: Speculation) -> list[str]:
    found = _speculation_json(plan, speculation)
    if found is None:
        return ["speculative: no times to correct"]
    return [
        f"speculative: drafts of {speculation.length}, {speculation.acceptance:.0%} accepted: "
        f"{found['tokens_per_check']:.2f} tokens a check of {1e3 * found['check']:.2f} ms, "
        f"{1e3 * found['step']:.2f} ms a token, {found['speedup']:.2f} times as fast (analytic)"
    ]
