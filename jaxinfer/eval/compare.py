"""Variants of one program, measured in one run against the program itself: quality, size and speed."""

import dataclasses
import datetime
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InputError
from jaxinfer.eval import roofline, size, speed, tasks
from jaxinfer.eval.agreement import Mean, Reference
from jaxinfer.eval.journal import fingerprint
from jaxinfer.eval.results import BASELINE, TASKS, Results, Row, Settings, Variant
from jaxinfer.generation import tokenizer_of
from jaxinfer.passes import apply, parse
from jaxinfer.program import Program
from jaxinfer.sharding.mesh import show_mesh
from jaxinfer.sharding.model import OnMesh
from jaxinfer.sharding.processes import lost

_DEFAULTS = Settings()
_PACKAGES = ("jaxinfer", "jax", "jaxlib")


def compare(
    program: Program,
    variants: Sequence[Variant],
    data: Mapping[str, Any],
    out: str | Path,
    *,
    settings: Settings = _DEFAULTS,
    calibration: Any = None,
    command: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> list[Row]:
    """Measure the program and its variants and return a row each, the baseline's first; `out`/results.jsonl has them.

    `data` has for each task what to measure it on: a text or token ids for "perplexity" (from which KL and agreement
    with the baseline come too), rows for "lambada" and "hellaswag". A variant that fails, out of memory too, is a row
    that says why. A variant that the file has already is not measured again, unless it failed.

    Raises:
        InputError: a misspelt pass or option, two variants of one name, a file made with other settings; or what the
            baseline itself raises.
    """
    check(variants, data)
    run = _Run(program, data, settings, calibration, note, progress)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, run.settings())
    if results.rows.get(BASELINE, {}).get("status") == "ok":
        run.limits = roofline.Machine(**results.rows[BASELINE]["roofline"]["machine"])  # all shares are of the same
    wanted = [Variant(BASELINE, ()), *variants]
    for i, variant in enumerate(wanted, 1):
        row = results.rows.get(variant.name)
        if row is not None and row["status"] == "ok":
            if tuple(row["passes"]) != variant.passes:
                raise InputError(
                    f"{results.path}: {variant.name!r} is {' '.join(row['passes'])} there, now it is "
                    f"{' '.join(variant.passes)}; give it another name, or give another --out"
                )
            note(f"[{i}/{len(wanted)}] {variant.name}: measured already")
            continue
        run.prefix = f"[{i}/{len(wanted)}] {variant.name}"
        row = results.append({**run.measure(variant), "command": command})
        if row["status"] != "ok":
            note(f"{run.prefix}: failed: {row['error']}")
            if variant.name == BASELINE:
                raise InputError(f"the baseline failed, so there is nothing to compare with: {row['error']}")
    return [results.rows[variant.name] for variant in wanted]


def check(variants: Sequence[Variant], data: Mapping[str, Any]) -> None:
    """Raise InputError for a task or a pass that does not exist, or names that are not each variant's own."""
    if unknown := [name for name in data if name not in TASKS]:
        raise InputError(f"no task {unknown[0]!r}: there are {', '.join(TASKS)}")
    if not data:
        raise InputError(f"no data: give it for at least one of {', '.join(TASKS)}")
    names = [BASELINE]
    for variant in variants:
        if variant.name in names:
            what = "is the unchanged model's" if variant.name == BASELINE else "is given twice"
            raise InputError(f"variant {variant.name!r}: the name {what}; give each variant its own")
        names.append(variant.name)
        if not variant.passes:
            raise InputError(f"variant {variant.name!r}: has no passes; give at least one")
        for spec in variant.passes:
            parse(spec)


class _Run:
    """The baseline, the data, and what is computed of them once for all variants."""

    def __init__(self, program: Program, data: Mapping[str, Any], settings: Settings, calibration, note, progress):
        self.program, self.data, self.options = program, dict(data), settings
        self.calibration, self.note, self.progress = calibration, note, progress
        self.prefix = ""
        self.limits: roofline.Machine | None = None
        self._reference: Reference | None = None
        text = self.data.pop("perplexity", None)
        if text is not None:
            tokens = tokenizer_of(program).encode(text) if isinstance(text, str) else [int(t) for t in text]
            text = tokens[: settings.max_tokens]
        self.tokens = text
        n = settings.prompt_tokens
        rng = np.random.default_rng(settings.seed)
        self.prompt_from = "text" if text is not None and len(text) >= n else "random"
        self.prompt = text[:n] if self.prompt_from == "text" else rng.integers(0, program.config.vocab_size, n).tolist()
        self.dtype = str(jax.eval_shape(program.model.embed, jax.ShapeDtypeStruct((1, 1), jnp.int32)).dtype)

    def settings(self) -> dict[str, Any]:
        """Return everything that the rows of one file must share."""
        texts = {"perplexity": self.tokens} if self.tokens is not None else {}
        calibration, model = getattr(self.calibration, "tokens", None), self.program.model
        return {
            "model": self.program.name,
            "weights": _hash(fingerprint(self.program)),
            "dtype": self.dtype,
            "data": {task: _hash(rows) for task, rows in {**texts, **self.data}.items()},
            "calibration": None if calibration is None else _hash(np.asarray(calibration).tolist()),
            **dataclasses.asdict(self.options),
            **({"mesh": show_mesh(model.mesh.shape)} if isinstance(model, OnMesh) else {}),
            "device": roofline.device_name(),
            "versions": {"python": platform.python_version()} | {p: sys.modules[p].__version__ for p in _PACKAGES},
        }

    def measure(self, variant: Variant) -> Row:
        """Return a variant's row; whatever goes wrong is written in it."""
        row: Row = {"variant": variant.name, "status": "ok", "passes": list(variant.passes), "error": None}
        stage = "passes"
        try:
            self.note(f"{self.prefix}: passes")
            program = apply(self.program, *variant.passes, calibration=self.calibration)
            for stage, part in self._parts(program):
                self.note(f"{self.prefix}: {stage}")
                row |= part()
        except Exception as e:
            if _interrupted(e):
                raise KeyboardInterrupt from e
            if lost(e):
                raise  # it says nothing of the variant
            text = str(e) if isinstance(e, InputError) else f"{type(e).__name__}: {e}"
            row |= {"status": "failed", "stage": stage, "error": " ".join(text.split())[:500]}
        return {**row, "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}

    def _parts(self, program: Program) -> Iterator[tuple[str, Callable[[], Row]]]:
        """Yield the name of each stage and what measures it, for bars and for the row of one that fails."""
        quality: dict[str, Any] = {}

        def scores(task: str, of: Callable[[Program], dict[str, Mean]]) -> Row:
            quality.update({key: dataclasses.asdict(mean) for key, mean in of(program).items()})
            return {"quality": dict(quality)}

        if self.tokens is not None:
            yield "perplexity", lambda: scores("perplexity", self._agreement)
        for task in self.data:
            yield task, lambda task=task: scores(task, lambda p: self._task(task, p))
        yield "speed", lambda: self._speed(program)
        yield "size", lambda: {"size": self._size(program)}

    def _agreement(self, program: Program) -> dict[str, Mean]:
        o = self.options
        if self._reference is None:
            self._reference = Reference(self.program, self.tokens, o.window, o.batch_size, self.progress)
        found = self._reference.compare(program, self.progress)
        names = ("perplexity", "kl", "top1", "nats", "extra_nats")
        return {name: getattr(found, name) for name in names}

    def _task(self, task: str, program: Program) -> dict[str, Mean]:
        o = self.options
        measure = tasks.lambada if task == "lambada" else tasks.hellaswag
        found = measure(program, self.data[task], o.limit, batch_size=o.batch_size, progress=self.progress)
        return {f"{task}_{key}": Mean(value, found.stderr[key]) for key, value in found.metrics.items()}

    def _size(self, program: Program) -> Row:
        return dataclasses.asdict(size.measure_size(program, self.prompt, self.options.decode_tokens))

    def _speed(self, program: Program) -> Row:
        """Time the program and the baseline in turns; the baseline itself is only timed against itself."""
        o = self.options
        programs = {BASELINE: self.program, "variant": program}
        if not program.passes[len(self.program.passes) :]:
            programs.pop(BASELINE)
        found = speed.measure_speed(programs, self.prompt, o.decode_tokens, o.rounds)
        ours, base = found["variant"], found.get(BASELINE, found["variant"])
        n = len(self.prompt)
        rates = {
            "prefill": speed.rate([n / r.prefill for r in ours], [n / r.prefill for r in base]),
            "decode": speed.rate([r.decoded / r.decode for r in ours], [r.decoded / r.decode for r in base]),
            "first_token": speed.latency([r.first_token for r in ours], [r.first_token for r in base]),
        }
        limits = self.limits = self.limits or roofline.machine(self.dtype)
        read = roofline.decode_bytes(program, size.cache_cost(program), n + o.decode_tokens / 2)
        flops = roofline.prefill_flops(program, n)
        return {
            "speed": {
                **{name: dataclasses.asdict(r) for name, r in rates.items()},
                "prompt": self.prompt_from,
                "rounds": {
                    BASELINE: list(map(dataclasses.asdict, base)),
                    "variant": list(map(dataclasses.asdict, ours)),
                },
            },
            "roofline": {
                "decode": rates["decode"].median * read / limits.bandwidth,
                "prefill": rates["prefill"].median / n * flops / limits.flops,
                "machine": dataclasses.asdict(limits),
            },
        }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C is behind an error: a computation that it tears may raise something else."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
