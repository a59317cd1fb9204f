"""How close a program's predictions are to a baseline's on the same text: KL, top-1 agreement, both perplexities."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxinfer.cache.base import Cache
from jaxinfer.decode import loop
from jaxinfer.decode.rows import check_ids
from jaxinfer.errors import InputError
from jaxinfer.models.transformer import Transformer
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program

_LOGITS = 1 << 24  # logits of each of the two programs that exist at once: 64 MiB in float32


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over tokens and its standard error, from the spread between windows."""

    value: float
    stderr: float


@dataclasses.dataclass(frozen=True)
class Agreement:
    """A program against the baseline over `tokens` predicted tokens."""

    kl: Mean  # KL(baseline || program), nats a token
    top1: Mean  # share of tokens where both find the same token most likely
    nats: Mean  # mean negative log-probability of the text's own tokens
    extra_nats: Mean  # nats - baseline's; its error is of the difference, token by token, so far smaller than of nats
    tokens: int

    @property
    def perplexity(self) -> Mean:
        """Return exp(nats), its error to first order."""
        value = math.exp(self.nats.value) if self.nats.value < 700 else math.inf
        return Mean(value, value * self.nats.stderr)


class Reference:
    """A baseline on a text, cut into windows as `score_text` cuts it; any number of programs are compared with it.

    The baseline runs once. Of its predictions only the hidden states are kept, in host memory (tokens x embed_dim), and
    logits are made from them again for a few tokens at a time.

    Raises:
        InputError: fewer than two tokens, a token outside the vocabulary, or a window that the model can't take.
    """

    def __init__(
        self,
        baseline: Program,
        tokens: Sequence[int] | Int[np.ndarray, "n"],
        window: int = 512,
        batch_size: int = 8,
        progress: bool = False,
    ):
        limit = baseline.config.max_context
        if not 2 <= window <= limit:
            raise InputError(f"window={window}: must be in 2..{limit}, which is the model's context")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: must be 1 or more")
        tokens = [int(t) for t in tokens]
        if len(tokens) < 2:
            raise InputError(f"a text of {len(tokens)} tokens: needs 2 or more, the first is only context")
        check_ids(tokens, baseline.config.vocab_size)
        windows = [tokens[i : i + window] for i in range(0, len(tokens), window)]
        self._windows = [w for w in windows if len(w) > 1]  # a single last token has nothing to be predicted from
        self._batch_size = min(batch_size, len(self._windows))
        self._model = baseline.model
        bar = self._bar(progress)
        self._hidden = [[fetch(h) for h in self._run(self._model, batch, bar)] for batch in self._batches()]
        bar.close()

    def compare(self, program: Program, progress: bool = False) -> Agreement:
        """Return how a program agrees with the baseline. With itself, `kl` and `extra_nats` are 0 and `top1` is 1.

        `KL = sum_v p(v) (log p(v) - log q(v))` with p the baseline's next-token distribution (Kullback, Leibler 1951).

        Raises:
            InputError: the program has another vocabulary.
        """
        ours, theirs = program.config.vocab_size, self._model.config.vocab_size
        if ours != theirs:
            raise InputError(f"a vocabulary of {ours} tokens: must be the baseline's, which has {theirs}")
        sums = []
        bar = self._bar(progress)
        for batch, kept in zip(self._batches(), self._hidden, strict=True):
            total = np.zeros((4, self._batch_size))
            chunks = loop.chunks([row[:-1] for row in batch])
            for (start, padded, counts), p, q in zip(chunks, kept, self._run(program.model, batch, bar), strict=True):
                targets = np.zeros_like(padded)
                for b, n in enumerate(counts):
                    targets[b, :n] = batch[b][start + 1 : start + 1 + n]
                total += fetch(_compare(self._model, program.model, p, q, targets, counts)).astype(np.float64)
            sums.append(total)
        bar.close()
        kl, same, nats, extra = np.concatenate(sums, axis=1)[:, : len(self._windows)]
        counts = np.array([len(w) - 1 for w in self._windows], np.float64)
        return Agreement(*(_mean(x, counts) for x in (kl, same, nats, extra)), tokens=int(counts.sum()))

    def _batches(self) -> list[list[list[int]]]:
        """Return the windows in batches of one size: the last is filled up with windows of one token, never scored."""
        size = self._batch_size
        batches = [self._windows[i : i + size] for i in range(0, len(self._windows), size)]
        batches[-1] = batches[-1] + [[0]] * (size - len(batches[-1]))
        return batches

    def _run(self, model: Transformer, batch: list[list[int]], bar: tqdm):
        """Yield the hidden states of each chunk of a batch of windows."""
        fed = [row[:-1] for row in batch]
        cache = loop.empty_cache(model, len(fed), loop.slots_for(max(len(row) for row in fed)))
        for _, padded, counts in loop.chunks(fed):
            cache, hidden = _hidden(model, cache, padded, counts)
            yield hidden
            bar.update(int(counts.sum()))

    def _bar(self, progress: bool) -> tqdm:
        return tqdm(total=sum(len(w) - 1 for w in self._windows), unit="token", disable=not progress)


@functools.partial(jax.jit, donate_argnames=("cache",))
def _hidden(
    model: Transformer, cache: Cache, tokens: Int[Array, "B T"], counts: Int[Array, "B"]
) -> tuple[Cache, Float[Array, "B T D"]]:
    hidden, cache = model(tokens, cache, counts)
    return cache, hidden


@jax.jit
def _compare(
    baseline: Transformer,
    model: Transformer,
    p_hidden: Float[Array, "B T D"],
    q_hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    counts: Int[Array, "B"],
) -> Float[Array, "4 B"]:
    """Return each row's sums over its first counts[b] tokens: KL, same most likely token, nats, nats - baseline's."""
    B, T = targets.shape
    size = max(1, min(T, _LOGITS // (B * model.config.vocab_size)))
    pad = -T % size

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[2:]), 1, 0)

    def compare(block):
        p_hidden, q_hidden, targets, real = block
        logp, logq = (jax.nn.log_softmax(m.logits(h)) for m, h in ((baseline, p_hidden), (model, q_hidden)))
        of_p, of_q = (jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0] for x in (logp, logq))
        kl = (jnp.exp(logp) * (logp - logq)).sum(axis=-1)
        same = jnp.argmax(logp, axis=-1) == jnp.argmax(logq, axis=-1)
        return jnp.where(real, jnp.stack([kl, same.astype(kl.dtype), -of_q, of_p - of_q]), 0.0).sum(axis=-1)

    real = jnp.arange(T)[None] < counts[:, None]
    return jax.lax.map(compare, tuple(map(blocks, (p_hidden, q_hidden, targets, real)))).sum(axis=0)


def _mean(sums: Float[np.ndarray, "n"], counts: Float[np.ndarray, "n"]) -> Mean:
    """Return the mean over tokens; windows are the independent draws, so the error is of a ratio of their sums."""
    n = len(sums)
    mean = float(sums.sum() / counts.sum())
    spread = ((sums - mean * counts) ** 2).sum() * n / (n - 1) if n > 1 else math.nan
    return Mean(mean, math.sqrt(spread) / float(counts.sum()))
