"""Surgery on immutable module trees: name a node by its path, replace it, and share everything else."""

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxinfer.errors import InputError

Kinds = type | tuple[type, ...]


def path_of(key_path: tuple) -> str:
    """Return a `jax.tree_util` key path as dotted names: `layers.3.attention.o.kernel`."""
    return ".".join(str(getattr(k, "name", getattr(k, "idx", getattr(k, "key", k)))) for k in key_path)


def leaves(tree: Any) -> dict[str, Any]:
    """Return every leaf of `tree` by its dotted path."""
    return {path_of(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def replace(node: nnx.Module, **changes: Any) -> nnx.Module:
    """Return a copy of `node` with some fields changed; the other fields are shared, not copied."""
    leaves, treedef = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    copy = jax.tree.unflatten(treedef, leaves)
    for name, value in changes.items():
        if not hasattr(copy, name):
            raise ValueError(f"{type(node).__name__} has no field {name!r}; it has {', '.join(_fields(node))}")
        setattr(copy, name, value)
    return copy


def select(tree: Any, kind: Kinds, where: str = ".*") -> dict[str, Any]:
    """Return the nodes of type `kind` whose dotted path fully matches the regular expression `where`."""
    found: dict[str, Any] = {}
    _walk(tree, "", kind, re.compile(where), lambda path, node: found.setdefault(path, node))
    return found


def rewrite(tree: Any, kind: Kinds, where: str, fn: Callable[[Any], Any]) -> Any:
    """Return `tree` with `fn(node)` in place of every node of type `kind` whose path fully matches `where`.

    Nothing is assigned in the input; untouched arrays are shared. Nodes inside a replaced node are not visited.

    Raises:
        InputError: nothing matched; the message lists the paths of that kind.
    """
    return rewrite_by_path(tree, kind, where, lambda _, node: fn(node))


def rewrite_by_path(tree: Any, kind: Kinds, where: str, fn: Callable[[str, Any], Any]) -> Any:
    """Return `rewrite(tree, kind, where, ...)` with `fn(path, node)` for the new node."""
    count = 0

    def apply(path, node):
        nonlocal count
        count += 1
        return fn(path, node)

    try:
        pattern = re.compile(where)
    except re.error as e:
        raise InputError(f"where={where!r}: not a regular expression ({e})") from None
    out = _walk(tree, "", kind, pattern, apply)
    if count == 0:
        paths = list(select(tree, kind))
        name = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(
            f"where={where!r}: matches no {name}; "
            + (
                f"there are {len(paths)}: {', '.join(paths[:8])}{' ...' if len(paths) > 8 else ''}"
                if paths
                else "the tree has none"
            )
        )
    return out


def _walk(node: Any, path: str, kind: Kinds, where: re.Pattern, fn: Callable[[str, Any], Any]) -> Any:
    if isinstance(node, kind) and where.fullmatch(path):
        return fn(path, node)
    if isinstance(node, list):
        new = [_walk(x, f"{path}.{i}".lstrip("."), kind, where, fn) for i, x in enumerate(node)]
        return new if any(a is not b for a, b in zip(new, node, strict=True)) else node
    if isinstance(node, nnx.Module):
        changes = {}
        for name in _fields(node):
            old = getattr(node, name)
            if isinstance(old, (nnx.Module, list)):
                new = _walk(old, f"{path}.{name}".lstrip("."), kind, where, fn)
                if new is not old:
                    changes[name] = new
        return replace(node, **changes) if changes else node
    return node


def _fields(node: nnx.Module) -> list[str]:
    return list(type(node).__dataclass_fields__)
