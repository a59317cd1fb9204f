"""Assemble a model from a checkpoint's tensors: check every name and shape first, then stream the bytes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from tqdm import tqdm

from jaxinfer.checkpoint.arrays import aligned_empty, all_finite, elsewhere
from jaxinfer.checkpoint.base import Entry
from jaxinfer.checkpoint.names import NameTable, Rule
from jaxinfer.errors import InputError
from jaxinfer.models.config import ModelConfig
from jaxinfer.ops.placement import send
from jaxinfer.ops.quantized import Packed, is_quantized, nbytes
from jaxinfer.tree import path_of

Tree = TypeVar("Tree")
ShardingOf = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]

WORKERS = 4  # reading overlaps with transposing and casting; numpy releases the interpreter lock in all three
SHOWN = 10  # names listed of each kind of misfit


@dataclasses.dataclass(frozen=True)
class _Job:
    """One leaf and the stored tensors that make it: several where each expert is stored on its own."""

    path: str
    leaf: jax.ShapeDtypeStruct | Packed  # a Packed of shapes where the blocks of the file are kept
    rule: Rule
    entries: tuple[Entry, ...]

    @property
    def kind(self) -> str | None:
        """The kind of `Packed` that the leaf could stay; None where it has to be dequantized."""
        kinds = {entry.qtype for entry in self.entries}
        return kinds.pop() if len(kinds) == 1 and self.rule.transform.rows is not None else None

    @property
    def piece(self) -> tuple[int, ...]:
        """The part of the leaf's shape that one entry fills."""
        return self.leaf.shape[1:] if "{e}" in self.rule.pattern else self.leaf.shape

    @property
    def working_bytes(self) -> int:
        """Host memory while the leaf is in flight: the leaf itself and one entry as read, at most in float32."""
        if is_quantized(self.leaf):
            return nbytes(self.leaf) + 2 * self.entries[0].nbytes  # as read, and its codes or rows put in order
        return nbytes(self.leaf) + 4 * math.prod(self.entries[0].shape)


def assemble(
    abstract: Tree,
    config: ModelConfig,
    entries: Mapping[str, Entry],
    names: NameTable,
    *,
    path: Path,
    sharding_of: ShardingOf | None = None,
    progress: bool = False,
    held: Tree | None = None,
) -> Tree:
    """Return `abstract` with its `jax.ShapeDtypeStruct` leaves replaced by the arrays stored in `entries`.

    Each array has the dtype that its abstract leaf asks for, and lies where `sharding_of(path, leaf)` puts it (on the
    default device without it). Names and shapes are settled from the headers before any byte is read. Leaves are then
    loaded largest first, a few at a time: host memory stays near the size of the model in its final dtype.

    `held` is `abstract` with some leaves, of those that `stored_kinds` names, as a `Packed` of shapes with its outputs
    first: these take the blocks of the file as they are.

    Raises:
      InputError: tensors are missing, unexpected or misshapen (all of them in one message), or one holds a value that
        is not finite in the leaf's dtype.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
    jobs = _match([(path_of(keys), leaf) for keys, leaf in leaves], config, entries, names, path)
    if held is not None:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(held, is_leaf=is_quantized)
        wanted = {path_of(keys): leaf for keys, leaf in leaves}
        jobs = [dataclasses.replace(job, leaf=wanted[job.path]) for job in jobs]
    arrays = _stream(jobs, path, sharding_of, progress)
    return jax.tree.unflatten(treedef, [arrays[path_of(keys)] for keys, _ in leaves])


def stored_kinds(
    abstract: Tree, config: ModelConfig, entries: Mapping[str, Entry], names: NameTable, *, path: Path
) -> dict[str, str]:
    """Return the kind of `Packed` that each leaf can stay, by its path: those that the checkpoint has in such blocks.

    Raises InputError where the tensors are not those of `abstract`. Reads headers only.
    """
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    jobs = _match([(path_of(keys), leaf) for keys, leaf in leaves], config, entries, names, path)
    return {job.path: kind for job in jobs if (kind := job.kind) is not None}


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


def _stream(jobs: list[_Job], path: Path, sharding_of: ShardingOf | None, progress: bool) -> dict[str, Any]:
    """Load the largest leaves first, so that their temporaries exist before the rest of the model does."""
    jobs = sorted(jobs, key=lambda job: -job.working_bytes)
    total = sum(nbytes(job.leaf) for job in jobs)
    budget = total // 8 // jax.process_count()  # a leaf above it is loaded alone
    arrays: dict[str, Any] = {}
    in_flight: dict[Future, _Job] = {}
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"loading {path.name}", disable=not progress)

    def used() -> int:
        return sum(job.working_bytes for job in in_flight.values())

    def collect() -> None:
        for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
            job = in_flight.pop(future)
            arrays[job.path] = future.result()
            bar.update(nbytes(job.leaf))

    with bar, ThreadPoolExecutor(WORKERS) as pool:
        for job in jobs:
            while in_flight and (len(in_flight) == WORKERS or used() + job.working_bytes > budget):
                collect()
            in_flight[pool.submit(_load, job, path, sharding_of)] = job
        while in_flight:
            collect()
    return arrays


def _load(job: _Job, path: Path, sharding_of: ShardingOf | None) -> jax.Array | Packed:
    kept = is_quantized(job.leaf)
    shapes = jax.tree.leaves(job.leaf)  # one, or the codes, the scales and perhaps the offsets
    shardings = [sharding_of(job.path, shape) if sharding_of else None for shape in shapes]
    if all(s is not None and not s.addressable_devices for s in shardings):
        # Of a stage on other processes' devices: nothing of it is read here.
        return jax.tree.unflatten(
            jax.tree.structure(job.leaf), [elsewhere(*x) for x in zip(shapes, shardings, strict=True)]
        )
    host = [aligned_empty(shape.shape, shape.dtype) for shape in shapes]
    stacked = "{e}" in job.rule.pattern
    for i, entry in enumerate(job.entries):
        pieces = [part[i] if stacked else part for part in host]
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is caught below, with its name
            stored = jax.tree.leaves(entry.blocks()) if kept else [entry.read()]
            for piece, part in zip(pieces, stored, strict=True):
                if kept:
                    piece[...] = job.rule.transform.rows(part, job.piece).reshape(piece.shape)
                else:
                    piece[...] = job.rule.transform.apply(part, job.piece)
        if not all(all_finite(piece) for piece in pieces if piece.dtype not in (np.int8, np.uint8)):
            dtype = "blocks" if kept else job.leaf.dtype
            raise InputError(
                f"{path}: tensor {entry.name!r} ({entry.dtype}) has a NaN or infinite value as {dtype}; "
                "every weight must be finite: fetch the file again, or load it in a wider dtype"
            )
    arrays = [send(part, sharding) for part, sharding in zip(host, shardings, strict=True)]
    # The copy to an accelerator is asynchronous: wait, so that the host copy is gone before the next leaf starts.
    return jax.tree.unflatten(jax.tree.structure(job.leaf), jax.block_until_ready(arrays))
