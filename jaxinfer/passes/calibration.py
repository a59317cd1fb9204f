"""Text that passes calibrate on, and the sweep that gives them one layer's statistics after another's."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tqdm import tqdm

from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer
from jaxinfer.passes.taps import STATISTICS, totals
from jaxinfer.program import Program
from jaxinfer.tree import replace

Stats = Mapping[str, Mapping[str, Array]]  # path of a linear map in its layer -> statistic -> array


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Windows of text, and how a sweep over them runs.

    With `directory`, a sweep leaves each finished layer there, and one that was killed goes on from the last.
    """

    tokens: Int[np.ndarray, "n T"]
    batch_size: int = 8
    directory: Path | None = None
    progress: bool = False

    @classmethod
    def of(
        cls,
        program: Program,
        text_or_tokens: str | Sequence[int],
        windows: int = 64,
        window: int = 512,
        batch_size: int = 8,
        directory: str | Path | None = None,
        progress: bool = False,
    ) -> "Calibration":
        """Return the first `windows` windows of `window` tokens of a text, or of token ids.

        Raises:
            InputError: the text is shorter than one window, or a size is out of its range.
        """
        for name, value, most in (
            ("windows", windows, None), ("window", window, program.config.max_context), ("batch_size", batch_size, None)
        ):  # fmt: skip
            if value < 1 or (most is not None and value > most):
                raise InputError(f"{name}={value}: must be {'1 or more' if most is None else f'in 1..{most}'}")
        if isinstance(text_or_tokens, str):
            if program.tokenizer is None:
                raise InputError("calibration text: this program has no tokenizer; give token ids")
            text_or_tokens = program.tokenizer.encode(text_or_tokens)
        ids = np.asarray(text_or_tokens, np.int32)
        if len(ids) < window:
            raise InputError(f"calibration text of {len(ids)} tokens: one window takes {window}; give more text")
        if ids.min() < 0 or ids.max() >= program.config.vocab_size:
            raise InputError(f"calibration text: has a token outside 0..{program.config.vocab_size - 1}")
        windows = min(windows, len(ids) // window)
        directory = None if directory is None else Path(directory)
        return cls(ids[: windows * window].reshape(windows, window), batch_size, directory, progress)

    def batches(self) -> list[Int[np.ndarray, "b T"]]:
        """Return the windows, a few at a time."""
        return [self.tokens[i : i + self.batch_size] for i in range(0, len(self.tokens), self.batch_size)]


def sweep(
    model: Transformer,
    calibration: Calibration | None,
    wants: Sequence[str],
    visit: Callable[..., Any],
    label: str,
    choose: Callable[[int], Hashable] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Transformer:
    """Return the model with `visit(layer, its statistics)` in place of every layer, from the first to the last.

    A layer's statistics are of the text as it comes out of the layers below after their visit, so that a pass sees,
    and may correct, the errors that it made there. Only one layer's statistics exist at a time. On a tree of shapes
    nothing is run.

    With `choose`, layer i is visited as `visit(layer, statistics, choose(i))`; a visit is compiled once a choice.
    `options` of the visit are part of what a killed sweep must share with the one that goes on.

    Raises:
        InputError: an unknown statistic, or a directory that another sweep has written to.
    """
    if unknown := [name for name in wants if name not in STATISTICS]:
        raise InputError(f"{label}: no statistic {unknown[0]!r}; there are {', '.join(STATISTICS)}")
    wants = tuple(wants)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(model)):
        layers = [visit(x, _zeros(model, x, wants), *_choice(choose, i)) for i, x in enumerate(model.layers)]
        return replace(model, layers=layers)
    hidden = [_embed(model.embed, part) for part in calibration.batches()]
    visit = jax.jit(visit, static_argnums=() if choose is None else 2)
    saved = None if calibration.directory is None else Saved(calibration, f"{label} {dict(options or {})}", model)
    layers: list[Any] = []
    if saved is not None:
        shapes = [visit.eval_shape(x, _zeros(model, x, wants), *_choice(choose, i)) for i, x in enumerate(model.layers)]
        layers, hidden = saved.restore(shapes, hidden)
    with tqdm(
        total=len(model.layers), initial=len(layers), desc=label, unit="layer", disable=not calibration.progress
    ) as bar:
        for layer in model.layers[len(layers) :]:
            layers.append(visit(layer, _statistics(layer, hidden, wants), *_choice(choose, len(layers))))
            hidden = [_run(layers[-1], x) for x in hidden]
            if saved is not None:
                saved.write(len(layers) - 1, layers[-1], hidden)
            bar.update()
    return replace(model, layers=layers)


def _choice(choose: Callable[[int], Hashable] | None, index: int) -> tuple[Hashable, ...]:
    return () if choose is None else (choose(index),)


def survey(
    model: Transformer, calibration: Calibration, wants: Sequence[str], look: Callable[[Any, Stats], Any], label: str
) -> list[Any]:
    """Return `look(layer, its statistics)` of every layer of a model that stays as it is."""
    hidden = [_embed(model.embed, part) for part in calibration.batches()]
    look = jax.jit(look)
    found = []
    for layer in tqdm(model.layers, desc=label, unit="layer", disable=not calibration.progress):
        found.append(look(layer, _statistics(layer, hidden, tuple(wants))))
        hidden = [_run(layer, x) for x in hidden]
    return found


def _statistics(layer: Any, hidden: Sequence[Array], wants: tuple[str, ...]) -> Stats:
    total, counts = None, None
    for x in hidden:
        part, rows = _measure(layer, x, wants)
        if total is None:
            total, counts = part, rows
        else:
            total = {p: {s: STATISTICS[s][1](total[p][s], part[p][s]) for s in wants} for p in part}
            counts = {p: counts[p] + rows[p] for p in rows}
    return _divide(total, counts)


@functools.partial(jax.jit, static_argnames="wants")
def _measure(layer: Any, x: Array, wants: tuple[str, ...]) -> tuple[Stats, dict[str, Array]]:
    return totals(layer, lambda tapped: forward(tapped, x), wants)


def _divide(total: Stats, counts: Mapping[str, Array]) -> Stats:
    """Return means: of an expert that saw no token, zeros."""

    def mean(stat: Array, count: Array) -> Array:
        return stat / jnp.maximum(count, 1).reshape(*count.shape, *(1,) * (stat.ndim - count.ndim))

    return {p: {s: mean(v, counts[p]) if STATISTICS[s][2] else v for s, v in of.items()} for p, of in total.items()}


def _zeros(model: Transformer, layer: Any, wants: tuple[str, ...]) -> Stats:
    """Return statistics of the right shapes, for tracing."""
    x = jax.ShapeDtypeStruct((1, 1, model.config.embed_dim), jnp.float32)
    shapes = jax.eval_shape(lambda layer, x: _measure(layer, x, wants)[0], layer, x)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


@jax.jit
def _embed(embed: Any, tokens: Array) -> Array:
    return embed(tokens)


@jax.jit
def _run(layer: Any, x: Array) -> Array:
    return forward(layer, x)


def forward(layer: Any, x: Array) -> Array:
    """Return a layer's output for whole windows `[B, T, D]`, each from position 0."""
    B, T, _ = x.shape
    cache = layer.attention.init_cache(B, T, x.dtype)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    start, counts = jnp.zeros((B,), jnp.int32), jnp.full((B,), T, jnp.int32)
    return layer(x, positions, cache, start, counts)[0]


class Saved:
    """Finished layers of a sweep on disk, and the text's hidden states after the last of them."""

    def __init__(self, calibration: Calibration, label: str, model: Transformer):
        self.directory = calibration.directory
        weights = hashlib.sha256(np.asarray(model.final_norm.scale, np.float32).tobytes())
        weights.update(np.ascontiguousarray(calibration.tokens).tobytes())
        self.about = {"pass": label, "layers": len(model.layers), "model and text": weights.hexdigest()}
        self.directory.mkdir(parents=True, exist_ok=True)
        note = self.directory / "sweep.json"
        if note.exists() and json.loads(note.read_text()) != self.about:
            raise InputError(f"{note}: written by another calibration; give another directory, or remove this one")
        note.write_text(json.dumps(self.about))

    def restore(self, shapes: Sequence[Any], hidden: list[Array]) -> tuple[list[Any], list[Array]]:
        """Return the layers that are there and the hidden states after them; `hidden` where there are none."""
        done = next((i + 1 for i in reversed(range(len(shapes))) if self._hidden(i).exists()), 0)
        if not done:
            return [], hidden
        return [_read(self._layer(i), shapes[i]) for i in range(done)], _read(self._hidden(done - 1), hidden)

    def write(self, index: int, layer: Any, hidden: list[Array]) -> None:
        """Keep one more layer."""
        _write(self._layer(index), layer)
        _write(self._hidden(index), hidden)
        if index:
            self._hidden(index - 1).unlink(missing_ok=True)

    def _layer(self, index: int) -> Path:
        return self.directory / f"layer-{index}.npz"

    def _hidden(self, index: int) -> Path:
        return self.directory / f"hidden-{index}.npz"


def _write(path: Path, tree: Any) -> None:
    """Write a tree's leaves as bytes (numpy has no name for some dtypes); the file appears whole or not at all."""
    leaves = {f"a{i}": np.asarray(leaf).reshape(-1).view(np.uint8) for i, leaf in enumerate(jax.tree.leaves(tree))}
    scratch = path.with_suffix(".unfinished")
    with scratch.open("wb") as f:
        np.savez(f, **leaves)
    os.replace(scratch, path)


def _read(path: Path, like: Any) -> Any:
    """Return `like` with the leaves that `_write` wrote."""
    try:
        with np.load(path) as stored:
            leaves = [
                jnp.asarray(stored[f"a{i}"].view(leaf.dtype).reshape(leaf.shape))
                for i, leaf in enumerate(jax.tree.leaves(like))
            ]
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{path}: can't be read ({e}); remove its directory to start over") from None
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
