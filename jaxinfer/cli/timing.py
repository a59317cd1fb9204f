"""What a generation cost: tokens counted as they come, and clocks that leave out compilation."""

import os
import time
from collections.abc import Iterator, Sequence

import jax

from jaxinfer.program import Program
from jaxinfer.session import Rows, Session

_BEGAN = time.time()
_compiling = 0.0


def _listen(event: str, seconds: float, **_: object) -> None:
    global _compiling
    # Tracing, lowering and compiling, or reading the compiled program back from the cache on disk.
    if event.startswith("/jax/core/compile/"):
        _compiling += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Return the seconds that this process has spent compiling so far."""
    return _compiling


def process_age() -> float:
    """Return the seconds since this process started (where the system doesn't tell, since this file was imported)."""
    try:
        with open("/proc/self/stat") as f:
            ticks = int(f.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as f:
            return float(f.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - _BEGAN


class Tally(Session):
    """A session that counts each row's tokens, and notes when they came."""

    def __init__(self, program: Program, batch: int = 1):
        super().__init__(program, batch)
        self.tokens = [0] * batch  # emitted so far, stop tokens included
        self.ended = [False] * batch  # by a stop token or a stop string, not by running out of room
        self.first_seconds = 0.0  # from construction to the first token
        self.first_age = 0.0  # from the start of the process to the first token
        self.compile_seconds = 0.0  # spent compiling by the first token
        self.decode_seconds = 0.0  # from the first token to the last, without compilation
        self._begin, self._compiled = time.perf_counter(), compile_seconds()

    def decode(self, *args, **options) -> Iterator[Rows]:
        """Decode as a session does, and count what it yields."""
        stops = set(self.program.stop_ids)
        for dispatch, new in enumerate(super().decode(*args, **options)):
            now, compiled = time.perf_counter(), compile_seconds()
            if dispatch == 0:
                first, first_compiled = now, compiled
                self.first_seconds, self.first_age = now - self._begin, process_age()
                self.compile_seconds = min(compiled - self._compiled, self.first_seconds)
            self.decode_seconds = max(now - first - (compiled - first_compiled), 0.0)
            for b, row in enumerate(new):
                self.tokens[b] += len(row)
                self.ended[b] |= bool(row) and row[-1] in stops
            yield new

    def end(self, rows: Sequence[int]) -> None:
        """End rows early: a stop string was found."""
        for b in rows:
            self.ended[b] = True
        super().end(rows)

    def summary(self, prompt_tokens: int) -> str:
        """Return one line: what the prompt and the answer took. Rates leave compilation out."""
        prefill = max(self.first_seconds - self.compile_seconds, 1e-9)
        text = (
            f"prompt {prompt_tokens} tokens, prefill {prompt_tokens / prefill:.1f} tok/s; first token "
            f"{self.first_seconds:.2f} s after the request ({self.compile_seconds:.2f} s of it compiling), "
            f"{self.first_age:.2f} s after process start; {self.tokens[0]} new tokens"
        )
        if self.tokens[0] > 1 and self.decode_seconds:
            text += f", decode {(self.tokens[0] - 1) / self.decode_seconds:.1f} tok/s"
        return text
