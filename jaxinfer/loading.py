"""Programs from checkpoints of any format, and back: `load` and `save`."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import DTypeLike

from jaxinfer import device
from jaxinfer.checkpoint import orbax
from jaxinfer.checkpoint.assemble import assemble, stored_kinds
from jaxinfer.checkpoint.base import Source
from jaxinfer.checkpoint.registry import resolve
from jaxinfer.checkpoint.source import open_source
from jaxinfer.errors import InputError, nearest
from jaxinfer.huge_pages import Arenas, give_back_memory
from jaxinfer.models.config import config_from_dict, config_to_dict
from jaxinfer.models.transformer import Transformer, abstract
from jaxinfer.passes import apply
from jaxinfer.passes.layout import apply_layouts
from jaxinfer.passes.layout.fused import FusedGateUp, FusedQKV
from jaxinfer.passes.layout.separate import separate
from jaxinfer.passes.quantization.file_blocks import held_blocks, hold_blocks
from jaxinfer.paths import cache_dir
from jaxinfer.program import Program
from jaxinfer.sharding.fitting import unfit
from jaxinfer.sharding.model import off_stages
from jaxinfer.sharding.rules import DEFAULT, Rules
from jaxinfer.sharding.shard import Shard, shard
from jaxinfer.sharding.specs import sharding_of
from jaxinfer.text.tokenizer import Tokenizer
from jaxinfer.tree import select

SAVED_AS_IT_IS = "keep_quantized is for GGUF files, and a saved program stays as it is: leave it out"
DTYPES = ("float32", "bfloat16", "float16")


def load(
    name_or_path: str | os.PathLike,
    dtype: DTypeLike | None = None,
    progress: bool = False,
    keep_quantized: bool = False,
    mesh: Mesh | str | None = None,
    rules: Rules | str = DEFAULT,
) -> Program:
    """Load a model by name, path or hub repository, ready to run.

    A path is a Hugging Face directory (safetensors), a .safetensors or .gguf file, or what `save` wrote. Without
    `dtype`, dtype and weight layout are what this device ran fastest when it was measured (`jaxinfer info` shows it).
    `keep_quantized` leaves the Q8_0, Q4_0 and Q4_1 weights of a GGUF file as they are: its bytes, and its numbers.
    With a `mesh` ("data=2,model=4") every tensor goes straight to the devices that `rules` give its parts.

    Raises:
        InputError: the model is not found, damaged, or of an unsupported kind; the message names file, constraint, fix.
    """
    enable_compilation_cache()
    path = resolve(name_or_path)
    dtype = None if dtype is None else _check_dtype(dtype)
    place = None if mesh is None else shard(mesh, rules)
    if orbax.is_saved(path):
        if keep_quantized:
            raise InputError(f"{path}: {SAVED_AS_IT_IS}")
        return _restore(path, dtype, place)
    source = open_source(path)
    kinds = kinds_to_keep(source) if keep_quantized else {}
    measured = place is None or dtype is None  # a layout is for one device: a mesh has the plain one
    choice = device.choose(source.config, dtype) if measured else device.Choice(dtype, (), ())
    shapes = abstract(source.config, choice.dtype)
    held = hold_blocks(shapes, kinds)
    if place is not None:
        place(Program(shapes))  # a mesh that does not fit is refused before any weight is read
    model = assemble(
        shapes, source.config, source.entries, source.names, path=path, progress=progress, held=held if kinds else None,
        sharding_of=None if place is None else sharding_of(held, place.mesh, place.rules),
    )  # fmt: skip
    program = Program(
        model=model,
        tokenizer=source.tokenizer,
        stop_ids=source.stop_ids,
        sampling=source.sampling,
        layouts=choice.layouts if place is None else (),
        blocks=held_blocks(model),
        name=os.fspath(name_or_path),
    )
    return program.replace(model=lay_out(model, choice.layouts)) if place is None else place(program)


def kinds_to_keep(source: Source) -> dict[str, str]:
    """Return which leaves `keep_quantized` can keep as blocks of the file, and the qtype of each.

    Raises:
        InputError: there are none.
    """
    if any(entry.qtype for entry in source.entries.values()):
        return stored_kinds(abstract(source.config), source.config, source.entries, source.names, path=source.path)
    found = ", ".join(sorted({entry.dtype for entry in source.entries.values()}))
    raise InputError(
        f"{source.path}: keep_quantized is for GGUF files with Q8_0, Q4_0 or Q4_1 tensors, this has {found}; "
        "leave it out"
    )


def lay_out(model: Transformer, layouts: Sequence[str]) -> Transformer:
    """Return the model with its layers in these layouts and, on a CPU, on huge pages. The one given is used up.

    Layers are replaced one by one in place, so that no second copy of all of them exists. The embedding stays where it
    is: it is large enough to have been given huge pages when it was made.
    """
    arenas = Arenas()

    def lay(i):
        block = model.layers[i]
        if jax.default_backend() == "cpu":
            block = jax.tree.map(np.asarray, block)  # no copy; and a layout is then one copy, into its place
        # Replaced by the thread that made it: one that waits for its turn here would let the others run ahead of it.
        model.layers[i] = arenas.settle(apply_layouts(block, layouts))
        del block
        give_back_memory()

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lay, range(len(model.layers))):
            pass  # raises what a thread raised
    return model


def save(program: Program, directory: str | os.PathLike) -> Path:
    """Write a program (Orbax) so that `load(directory)` gives it back; the directory appears whole or not at all.

    Raises:
        InputError: the directory exists, or the disk is full; nothing is left behind.
    """
    model = unfit(off_stages(program.model))
    metadata = {
        "config": config_to_dict(program.built or program.config),  # on which the passes are applied again
        "dtype": str(program.model.embed.table.dtype),
        "layouts": list(program.layouts),
        "separate": "fused" in program.layouts and not select(model, (FusedQKV, FusedGateUp)),
        "blocks": dict(program.blocks),
        "passes": [[name, dict(options)] for name, options in program.passes],
        "stop_ids": list(program.stop_ids),
        "sampling": dict(program.sampling),
        "name": program.name,
    }
    return orbax.save(Path(directory), model, metadata, program.tokenizer)


def _restore(path: Path, dtype: jnp.dtype | None, place: Shard | None) -> Program:
    metadata = orbax.read_metadata(path)
    model = abstract(config_from_dict(metadata["config"]), dtype or metadata["dtype"])
    blocks = metadata.get("blocks", {})
    model = hold_blocks(model, blocks)
    model.layers[:] = [apply_layouts(block, metadata["layouts"]) for block in model.layers]
    program = Program(
        model=model,
        tokenizer=Tokenizer.load(path / "tokenizer") if (path / "tokenizer").is_dir() else None,
        stop_ids=tuple(metadata["stop_ids"]),
        sampling=metadata["sampling"],
        layouts=tuple(metadata["layouts"]),
        blocks=blocks,
        name=metadata["name"],
    )
    # The passes on a tree of shapes give the tree that was saved: packed leaves, other nodes, other caches.
    program = apply(program, *map(tuple, metadata.get("passes", ())))
    shapes = separate(program.model) if metadata.get("separate") else program.model
    if place is None:
        return program.replace(model=lay_out(orbax.restore(path, shapes), ()))
    place(program)
    return place(program.replace(model=orbax.restore(path, place.shapes(shapes))))


def _check_dtype(dtype: DTypeLike) -> jnp.dtype:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in DTYPES:
        raise InputError(f"dtype={name!r}: {nearest(name, DTYPES)}")
    return jnp.dtype(name)


def enable_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, unless JAX was told where (or told not to)."""
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
