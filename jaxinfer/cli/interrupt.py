"""What Ctrl-C does: it ends a command, or in a chat only the answer."""

import _thread
import signal
import sys
import threading
from typing import Any

_LATER = 0.02  # seconds until a Ctrl-C that came at a bad moment is tried again


def install() -> None:
    """Let Ctrl-C raise KeyboardInterrupt, and raise it again where Python dropped it.

    Python drops exceptions in callbacks of its garbage collector and of weak references, and in finalizers. JAX has
    such callbacks, which is where a Ctrl-C often lands after a long computation: it would be lost.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    others = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if dropped.exc_type is KeyboardInterrupt:
            threading.Timer(_LATER, _again).start()
        else:
            others(dropped)

    sys.unraisablehook = hook


def _again() -> None:
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # wakes it from a wait, too
    else:
        _thread.interrupt_main()


def behind(error: BaseException | None) -> bool:
    """Return whether `error` came while a KeyboardInterrupt was on its way: a computation torn by it may fail too."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


class Interrupt:
    """While entered, Ctrl-C sets `pressed` and raises nothing, so that no computation is torn in the middle."""

    def __init__(self):
        self.pressed = False

    def __enter__(self) -> "Interrupt":
        self.pressed = False
        self._main = threading.current_thread() is threading.main_thread()  # only there can signals be handled
        if self._main:
            self._old = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._old)

    def _press(self, *_: object) -> None:
        self.pressed = True
