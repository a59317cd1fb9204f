"""Assemble a model from a checkpoint's tensors: check every name and shape first, then stream the bytes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.base import Entry
from jaxinfer.checkpoint.names import NameTable, Rule
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.tree import path_of

Tree = TypeVar("Tree")
ShardingOf = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]

WORKERS = 4  # reading overlaps with transposing and casting; numpy releases the interpreter lock in all three
SHOWN = 10  # names listed of each kind of misfit


@dataclasses.dataclass(frozen=True)
class _Job:
    """One leaf and the stored tensors that make it: several where each expert is stored on its own."""

    path: str
    leaf: jax.ShapeDtypeStruct
    rule: Rule
    entries: tuple[Entry, ...]

    @property
    def piece(self) -> tuple[int, ...]:
        """The part of the leaf's shape that one entry fills."""
        return self.leaf.shape[1:] if "{e}" in self.rule.pattern else self.leaf.shape

    @property
    def working_bytes(self) -> int:
        """Host memory while the leaf is in flight: the leaf itself and one entry as read, at most in float32."""
        return math.prod(self.leaf.shape) * self.leaf.dtype.itemsize + 4 * math.prod(self.entries[0].shape)


def assemble(
    abstract: Tree,
    config: ModelConfig,
    entries: Mapping[str, Entry],
    names: NameTable,
    *,
    path: Path,
    sharding_of: ShardingOf | None = None,
    progress: bool = False,
) -> Tree:
    """Return `abstract` with its `jax.ShapeDtypeStruct` leaves replaced by the arrays stored in `entries`.

    Each array has the dtype that its abstract leaf asks for, and lies where `sharding_of(path, leaf)` puts it (on the
    default device without it). Names and shapes are settled from the headers before any byte is read. Leaves are then
    loaded largest first, a few at a time: host memory stays near the size of the model in its final dtype.

    Raises:
      InputError: tensors are missing, unexpected or misshapen (all of them in one message), or one holds a value that
        is not finite in the leaf's dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    jobs = _match([(path_of(keys), leaf) for keys, leaf in leaves], config, entries, names, path)
    arrays = _stream(jobs, path, sharding_of, progress)
    return jax.tree.unflatten(treedef, [arrays[path_of(keys)] for keys, _ in leaves])


def _match(
    leaves: list[tuple[str, jax.ShapeDtypeStruct]],
    config: ModelConfig,
    entries: Mapping[str, Entry],
    names: NameTable,
    path: Path,
) -> list[_Job]:
    """Find the stored tensors of every leaf and the leaf of every stored tensor, by name and by shape."""
    spellings: dict[str, list[Rule]] = {}
    for rule in names.rules:
        spellings.setdefault(rule.path, []).append(rule)
    stored: dict[str, Entry] = {}
    missing, unexpected, misshapen = [], [], []
    for name, entry in entries.items():
        plain = names.canonical(name)
        if plain in stored:
            unexpected.append(f"{name} (a second spelling of {stored[plain].name})")
        stored.setdefault(plain, entry)

    jobs, used = [], set()
    for leaf_path, leaf in leaves:
        layer, pattern = _split_layer(leaf_path)
        candidates = [(rule, _stored_names(rule, layer, leaf)) for rule in spellings.get(pattern, ())]
        if not candidates:
            missing.append(f"{leaf_path} (a leaf of the model that this format has no name for)")
            continue
        # The spelling that the checkpoint has most of; max keeps the first of equals.
        rule, wanted = max(candidates, key=lambda c: sum(name in stored for name in c[1]))
        used.update(wanted)
        missing.extend(name for name in wanted if name not in stored)
        job = _Job(leaf_path, leaf, rule, tuple(stored[name] for name in wanted if name in stored))
        expected = rule.transform.stored(job.piece)
        misshapen.extend(
            f"{e.name} is {list(e.shape)}, expected {list(expected)}" for e in job.entries if e.shape != expected
        )
        jobs.append(job)
    unexpected.extend(e.name for plain, e in stored.items() if plain not in used and not names.is_ignored(plain))

    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(kinds.values()):
        counts = ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items() if found)
        lines = [
            f"{path}: the tensors are not those of the {config.num_layers}-layer {config.family} model that the "
            f"configuration describes: {counts}; use the configuration that was saved with these weights"
        ]
        for kind, found in kinds.items():
            # A fused tensor feeds two leaves and would be named twice.
            found = list(dict.fromkeys(found))
            more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
            lines += [f"  {kind}: {item}" for item in found[:SHOWN] + more]
        raise InputError("\n".join(lines))
    return jobs


def _split_layer(leaf_path: str) -> tuple[str, str]:
    """Return ("3", "layers.{i}.rest") for "layers.3.rest", and ("", path) for a leaf outside the layers."""
    parts = leaf_path.split(".")
    if parts[0] == "layers" and len(parts) > 1:
        return parts[1], ".".join(["layers", "{i}", *parts[2:]])
    return "", leaf_path


def _stored_names(rule: Rule, layer: str, leaf: jax.ShapeDtypeStruct) -> list[str]:
    name = rule.pattern.replace("{i}", layer)
    return [name.replace("{e}", str(e)) for e in range(leaf.shape[0])] if "{e}" in name else [name]


def _stream(jobs: list[_Job], path: Path, sharding_of: ShardingOf | None, progress: bool) -> dict[str, jax.Array]:
    """Load the largest leaves first, so that their temporaries exist before the rest of the model does."""
    jobs = sorted(jobs, key=lambda job: -job.working_bytes)
    total = sum(math.prod(job.leaf.shape) * job.leaf.dtype.itemsize for job in jobs)
    budget = total // 8  # a leaf above it is loaded alone
    arrays: dict[str, jax.Array] = {}
    in_flight: dict[Future[jax.Array], _Job] = {}
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {path.name}", disable=not progress)

    def used() -> int:
        return sum(job.working_bytes for job in in_flight.values())

    def collect() -> None:
        for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
            job = in_flight.pop(future)
            arrays[job.path] = future.result()
            bar.update(arrays[job.path].nbytes)

    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            while in_flight and (len(in_flight) == WORKERS or used() + job.working_bytes > budget):
                collect()
            in_flight[pool.submit(_load, job, path, sharding_of)] = job
        while in_flight:
            collect()
    return arrays


def _load(job: _Job, path: Path, sharding_of: ShardingOf | None) -> jax.Array:
    host = _aligned_empty(job.leaf.shape, job.leaf.dtype)
    pieces = host if job.piece != job.leaf.shape else host[None]
    for piece, entry in zip(pieces, job.entries, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is caught below, with its name
            piece[...] = job.rule.transform.apply(entry.read(), job.piece)
        if not _all_finite(piece):
            raise InputError(
                f"{path}: tensor {entry.name!r} ({entry.dtype}) has a NaN or infinite value as {job.leaf.dtype}; "
                "every weight must be finite: fetch the file again, or load it in a wider dtype"
            )
    array = jax.device_put(host, sharding_of(job.path, job.leaf) if sharding_of else None)
    # The copy to an accelerator is asynchronous: wait, so that the host copy is gone before the next leaf starts.
    return array.block_until_ready()


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an uninitialized array on a 64-byte boundary, which JAX's CPU backend adopts without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def _all_finite(a: np.ndarray) -> bool:
    """Return whether `a` has no NaN and no infinity, without a boolean copy of it."""
    if a.size == 0:
        return True
    if a.dtype.itemsize != 2:
        return bool(np.isfinite(a.min()) and np.isfinite(a.max()))  # both carry a NaN through
    # numpy reduces 16-bit floats one by one; their bit patterns without the sign compare as integers, at full speed.
    infinity = int(np.array(np.inf, a.dtype).view(np.uint16))
    bits = a.reshape(-1).view(np.uint16)
    return all(int((bits[i : i + (1 << 20)] & 0x7FFF).max()) < infinity for i in range(0, bits.size, 1 << 20))
