"""A batch of conversations with its cache: feed prompts, decode, feed again; what is already cached is kept."""

from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from jaxinfer.decode import loop
from jaxinfer.decode.base import State
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program

Rows = list[list[int]]


class Session:
    """Rows of tokens and the cache that holds them; `feed` then `decode`, as often as wanted.

    The one mutable object of the decode path. It lives on the host, and holds no array that it gives away.
    """

    def __init__(self, program: Program, batch: int = 1):
        self.program = program
        self.rows: Rows = [[] for _ in range(batch)]  # what the cache holds, by row
        self._cache = None
        self._logits = None
        self._slots = 0
        self._longest = [0] * batch  # that each row has been since it was computed from its first token
        self._ended = np.zeros(batch, bool)
        self.steps: list[int] | None = None  # that the last `decode` took for each row, where the decoder counts them

    def feed(
        self, rows: Sequence[Sequence[int]], room: int = 0, progress: Callable[[int], object] | None = None
    ) -> int:
        """Make the cache hold exactly `rows` and `room` free slots beyond; return how many tokens were computed.

        A row's longest prefix that is cached already is kept, unless the cache can't be rewound so far. Empty rows are
        allowed: they decode nothing.

        Raises:
            InputError: another number of rows than the session has, a row longer than the model's context, or an id
                outside the vocabulary.
        """
        if len(rows) != len(self.rows):
            raise InputError(f"{len(rows)} rows: this session has {len(self.rows)}; make one with batch={len(rows)}")
        rows = [[int(t) for t in row] for row in rows]
        config = self.program.config
        for row in rows:
            if len(row) >= config.max_context:
                raise InputError(
                    f"prompt of {len(row)} tokens: the model's context is {config.max_context}, "
                    "and one must be left to generate; shorten the prompt"
                )
            check_ids(row, config.vocab_size)
        needed = min(max(len(row) for row in rows) + room, config.max_context)
        if needed > self._slots or self._cache is None:
            self._slots = loop.slots_for(needed)
            self._cache = loop.empty_cache(self.program.model, len(rows), self._slots)
            self.rows = [[] for _ in rows]
            self._longest = [0] * len(rows)
        keep = [_common_prefix(old, new) for old, new in zip(self.rows, rows, strict=True)]
        keep = [min(n, max(len(row) - 1, 0)) for n, row in zip(keep, rows, strict=True)]  # one token gives the logits
        limit = self._cache.exact_rewind
        if limit is not None:
            keep = [n if longest - n <= limit else 0 for n, longest in zip(keep, self._longest, strict=True)]
        cache, self._cache = self._cache, None
        if any(self.rows):
            cache = loop.rewind(cache, np.array(keep, np.int32))
        new = [row[n:] for n, row in zip(keep, rows, strict=True)]
        self._cache, self._logits = loop.prefill(self.program.model, cache, new, progress)
        self.rows = rows
        self._longest = [
            max(len(row), longest if n else 0) for row, n, longest in zip(rows, keep, self._longest, strict=True)
        ]
        return sum(len(row) for row in new)

    def decode(
        self,
        max_new_tokens: int | Sequence[int],
        *,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        stop_ids: Sequence[int] | None = None,
        steps: Callable[[int], int] = lambda dispatch: 1 << 30,
    ) -> Iterator[Rows]:
        """Yield each row's new tokens, once a dispatch of `steps(dispatch number)` decode steps.

        Row b draws with its own seed, `seed + b` when one number is given. The stop token is part of the output.
        `end(rows)` between two yields ends rows early. Leaving the iterator early is fine: the cache then holds what
        was computed.

        Raises:
            InputError: nothing was fed since the last `decode`, or limits or seeds are not one for every row.
        """
        program, batch = self.program, len(self.rows)
        for name, value in (("max_new_tokens", max_new_tokens), ("seed", seed)):
            if np.ndim(value) and len(value) != batch:
                raise InputError(f"{name} has {len(value)} values: give one, or one for each of the {batch} rows")
        if self._logits is None:
            raise InputError("nothing to decode: call feed before every decode")
        limit = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (batch,))
        lengths = np.array([len(row) for row in self.rows])
        limit = np.where(lengths > 0, np.minimum(limit, program.config.max_context - lengths), 0)
        if (lengths + limit).max() > self._slots:  # fed with too little room: once more, into a larger cache
            self.feed(self.rows, room=int((lengths + limit).max() - lengths.max()))
        far = self._cache.exact_rewind
        if far is not None and program.decoder.lookahead > far:
            raise InputError(
                f"drafts of {program.decoder.lookahead} tokens: the cache can only be rewound by {far}; draft fewer"
            )
        seeds = np.asarray(seed) if np.ndim(seed) else seed + np.arange(batch)
        sampling = Sampling() if sampling is None else sampling
        cache, logits, self._cache, self._logits = self._cache, self._logits, None, None
        state = loop.start(
            program.decoder,
            cache,
            logits,
            limit=limit,
            stop_ids=program.stop_ids if stop_ids is None else stop_ids,
            sampling=sampling,
            seeds=seeds % 2**32,
            seen=None if sampling.repetition_penalty is None else _seen(self.rows, program.config.vocab_size),
            own=program.decoder.prepare(self.rows, self._slots),
        )
        self._ended = np.zeros(batch, bool)
        told = np.zeros(batch, np.int64)
        dispatch = 0
        try:
            while True:
                emitted, tokens, done = map(fetch, (state.emitted, state.tokens, state.done))
                new = [tokens[b, told[b] : emitted[b]].tolist() for b in range(batch)]
                told = emitted.astype(np.int64)
                yield new
                if self._ended.any():
                    state = loop.finish(state, self._ended)
                    done = done | self._ended
                if done.all():
                    return
                state = loop.advance(program.decoder, program.model, state, np.int32(steps(dispatch)))
                dispatch += 1
        finally:
            self._keep(state)

    def end(self, rows: Sequence[int]) -> None:
        """End rows of the running `decode`: the host has seen a stop that the device can't, such as a string."""
        self._ended[list(rows)] = True

    def _keep(self, state: State) -> None:
        """Take the cache back. The newest token of a row was emitted but never fed, so it is not in the cache."""
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            # Ctrl-C in the middle of a dispatch: its result is lost, and its input was donated.
            self._cache, self._logits, self.rows = None, None, [[] for _ in self.rows]
            return
        emitted, tokens, length = map(fetch, (state.emitted, state.tokens, state.cache.length))
        self._cache = state.cache
        for b, row in enumerate(self.rows):
            self.rows[b] = (row + tokens[b, : emitted[b]].tolist())[: length[b]]
            self._longest[b] = max(self._longest[b], int(length[b]) + self.program.decoder.lookahead)
        self.steps = None if state.own is None else fetch(state.own.steps).tolist()


def check_ids(row: Sequence[int] | Int[np.ndarray, "n"], vocab_size: int) -> None:
    """Raise InputError where a token id is outside the vocabulary."""
    if len(row) and not (min(row) >= 0 and max(row) < vocab_size):
        bad = max(row) if max(row) >= vocab_size else min(row)
        raise InputError(f"token {bad}: must be in 0..{vocab_size - 1}; is this the right tokenizer?")


def _common_prefix(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def _seen(rows: Rows, vocab_size: int) -> np.ndarray:
    seen = np.zeros((len(rows), vocab_size), bool)
    for b, row in enumerate(rows):
        seen[b, row] = True
    return seen
