"""Programs on disk, written by Orbax: one array store, a JSON file that says what it is, and the tokenizer's files."""

import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax

from jaxinfer import tree
from jaxinfer.errors import InputError
from jaxinfer.text.tokenizer import Tokenizer

_FILE = "jaxinfer.json"
_FORMAT = 1


def is_saved(path: Path) -> bool:
    """Return whether `path` is a directory that `save` finished."""
    return (path / _FILE).is_file()


def save(directory: Path, model: Any, metadata: dict[str, Any], tokenizer: Tokenizer | None) -> Path:
    """Write everything beside `directory`, then give it its name: whenever a save is killed, no half of it loads.

    Raises:
        InputError: the directory exists already, or the disk is full; what was written is removed.
    """
    import orbax.checkpoint as ocp  # a second of imports that only saving and restoring need

    directory = Path(os.path.abspath(directory))
    if directory.exists():
        raise InputError(f"{directory} exists: choose another directory, or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}-unfinished-"))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(scratch / "arrays", tree.leaves(model))
        if tokenizer is not None:
            tokenizer.save(scratch / "tokenizer")
        (scratch / _FILE).write_text(json.dumps({"format": _FORMAT, **metadata}, indent=1))
        os.chmod(scratch, 0o755)  # mkdtemp's is private
        os.rename(scratch, directory)
    except BaseException as e:
        shutil.rmtree(scratch, ignore_errors=True)
        if _disk_full(e):
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
            free = shutil.disk_usage(directory.parent).free
            raise InputError(
                f"{directory}: the disk is full ({free / 1e9:.1f} GB free, the model takes {size / 1e9:.1f} GB); "
                "nothing was kept: free some space or save elsewhere"
            ) from e
        raise
    return directory


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what `save` was given as metadata.

    Raises:
        InputError: the file is damaged or of a newer format.
    """
    try:
        metadata = json.loads((path / _FILE).read_text())
        version = metadata.pop("format")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise InputError(f"{path / _FILE}: not the metadata of a saved program ({e}); save it again") from e
    if version != _FORMAT:
        raise InputError(f"{path / _FILE}: format {version}, this version reads {_FORMAT}; upgrade jaxinfer")
    return metadata


def restore(path: Path, abstract: Any) -> Any:
    """Return `abstract` with its leaves read from `path`, in the dtypes and to the places that it asks for.

    However they were divided when they were saved: a device reads its own part, and never more.

    Raises:
        InputError: the store is damaged, or its arrays are not those of `abstract`.
    """
    import orbax.checkpoint as ocp

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
        for name, leaf in tree.leaves(abstract).items()
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(Path(os.path.abspath(path)) / "arrays", wanted)
    except Exception as e:  # Orbax and TensorStore raise many kinds for one thing: this is not a whole store
        raise InputError(f"{path}: its arrays can't be read ({str(e).splitlines()[0][:200]}); save it again") from e
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[name] for name in wanted])


def _disk_full(e: BaseException | None) -> bool:
    """Return whether a full disk is behind `e`: TensorStore reports it in words, Python by number."""
    while e is not None:
        if getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(e):
            return True
        e = e.__cause__ or e.__context__
    return False
