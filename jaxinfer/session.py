"""A batch of conversations with its cache: feed prompts, decode, feed again; what is already cached is kept."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer.decode import loop
from jaxinfer.decode.base import State
from jaxinfer.decode.rows import Rows, check_ids, common_prefix, seen
from jaxinfer.decode.sampling import Sampling
from jaxinfer.errors import InputError
from jaxinfer.ops.placement import fetch
from jaxinfer.program import Program

_ROOM = 64  # tokens: what forks are given is a multiple of it, so that few shapes compile


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
        self._room = 0  # tokens that a row may have: as many as slots, but for what a fork was given
        self._shared = [0] * batch  # tokens at the front of each row that it may share with another, see `fork`
        self._longest = [0] * batch  # that each row has been since it was computed from its first token
        self._ended = np.zeros(batch, bool)
        # Of the last `decode`, where the decoder counts them: each row's steps, checks by their width, and the drafter.
        self.steps: list[int] | None = None
        self.checked: list[int] | None = None
        self.told: Any = None

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
        rows = self._checked(rows)
        needed = min(max(len(row) for row in rows) + room, self.program.config.max_context)
        keep = self._kept(rows)
        if needed > self._room or self._cache is None or any(n < s for n, s in zip(keep, self._shared, strict=True)):
            self._slots = self._room = loop.slots_for(needed)
            self._forget()
            self._cache = loop.empty_cache(self.program.model, len(rows), self._slots)
            keep = [0] * len(rows)
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

    def _checked(self, rows: Sequence[Sequence[int]]) -> Rows:
        """Return the rows as lists of numbers. Raises InputError where one is too long or has an impossible id."""
        rows, config = [[int(t) for t in row] for row in rows], self.program.config
        for row in rows:
            if len(row) >= config.max_context:
                raise InputError(
                    f"prompt of {len(row)} tokens: the model's context is {config.max_context}, "
                    "and one must be left to generate; shorten the prompt"
                )
            check_ids(row, config.vocab_size)
        return rows

    def _kept(self, rows: Rows) -> list[int]:
        """Return how many of each row's tokens are cached and can stay."""
        keep = [common_prefix(old, new) for old, new in zip(self.rows, rows, strict=True)]
        keep = [min(n, max(len(row) - 1, 0)) for n, row in zip(keep, rows, strict=True)]  # one token gives the logits
        limit = None if self._cache is None else self._cache.exact_rewind
        if limit is None:
            return keep
        return [n if longest - n <= limit else 0 for n, longest in zip(keep, self._longest, strict=True)]

    def _forget(self) -> None:
        """Have nothing cached."""
        batch = len(self.rows)
        self._cache, self._logits = None, None
        self.rows, self._longest, self._shared = [[] for _ in range(batch)], [0] * batch, [0] * batch

    def fork(self, suffixes: Sequence[Sequence[int]], room: int = 0, of: int | Sequence[int] = 0) -> "Session":
        """Return a session whose row i is row `of` (or of[i]) followed by suffixes[i], ready to decode `room` tokens.

        Only the suffixes are computed. A cache in pages shares what the rows have in common, on a mesh those that stay
        on the devices of row `of`; others copy their rows on the device. The cache goes with the branches: this session
        has nothing cached until `join`. (The primitive of Skeleton-of-Thought, 2307.15337, and APAR, 2401.06761.)

        Raises:
            InputError: no suffix, a row that does not exist or is empty, or what `feed` refuses.
        """
        parents = [of] * len(suffixes) if isinstance(of, int) else list(of)
        if not suffixes or len(parents) != len(suffixes):
            raise InputError(f"{len(suffixes)} suffixes for {len(parents)} branches: give each branch one, maybe empty")
        for row in parents:
            if not 0 <= row < len(self.rows) or not self.rows[row]:
                raise InputError(f"row {row} can't be forked: this session has {len(self.rows)}; feed it some tokens")
        whole = self._checked([[*self.rows[row], *suffix] for row, suffix in zip(parents, suffixes, strict=True)])
        longest = min(max(map(len, whole)) + room, self.program.config.max_context)
        if longest > self._room or self._cache is None:
            self.feed(self.rows, room=longest - max(map(len, self.rows)))
        # The last token of a row without a suffix is computed again: it gives the logits.
        shared = [min(len(self.rows[row]), len(new) - 1) for row, new in zip(parents, whole, strict=True)]
        own = _ROOM * -(-(longest - min(shared)) // _ROOM)
        out = type(self)(self.program, len(whole))
        out._cache = loop.fork(self._cache, np.array(parents, np.int32), np.array(shared, np.int32), room=own)
        out.rows = [new[:n] for new, n in zip(whole, shared, strict=True)]
        out._shared, out._longest = shared, [self._longest[row] for row in parents]
        out._slots, out._room = self._slots, longest
        self._forget()
        out.feed(whole, room=longest - max(map(len, whole)))
        return out

    def join(self, branches: "Session", row: Sequence[int], room: int = 0) -> int:
        """Hold `row` alone, out of the branch that has most of it cached; return how many tokens were computed.

        Joined text that begins with the first branch's, say, costs what the others have written. The cache comes back
        to this session, of one row: the branches have nothing cached after.

        Raises:
            InputError: the branches have nothing cached, this session has several rows, or what `feed` refuses.
        """
        if branches._cache is None or len(self.rows) != 1:
            raise InputError("nothing to join: branches that were fed or decoded, into a session of one row")
        (row,) = self._checked([row])
        kept = [common_prefix(old, row) for old in branches.rows]
        best = max(range(len(kept)), key=kept.__getitem__)
        self._cache = loop.take(branches._cache, np.array([best], np.int32))
        self.rows, self._longest, self._shared = [branches.rows[best]], [branches._longest[best]], [0]
        self._slots = self._room = branches._slots
        branches._forget()
        return self.feed([row], room)

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
        if (lengths + limit).max() > self._room:  # fed with too little room: once more, into a larger cache
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
            seen=None if sampling.repetition_penalty is None else seen(self.rows, program.config.vocab_size),
            own=program.decoder.prepare(program.model, self.rows, self._slots),
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
            self._forget()
            return
        emitted, tokens, length = map(fetch, (state.emitted, state.tokens, state.cache.length))
        self._cache = state.cache
        for b, row in enumerate(self.rows):
            self.rows[b] = (row + tokens[b, : emitted[b]].tolist())[: length[b]]
            self._longest[b] = max(self._longest[b], int(length[b]) + self.program.decoder.lookahead)
        if state.own is not None:
            self.steps, self.checked = (fetch(x).tolist() for x in (state.own.steps, state.own.checked))
            self.told = state.own.drafter
