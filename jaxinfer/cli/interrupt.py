"""What Ctrl-C does: it ends a command, or in a chat only the answer."""

import _thread
import gc
import signal
import threading
from types import FrameType

_LATER = 0.02  # seconds until a Ctrl-C that came at a bad moment is tried again


def deliver(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, as Python's own handler does, but not inside a callback of the garbage collector.

    Python drops exceptions there, and JAX has such a callback, which is where a Ctrl-C often lands after a long
    computation: it would be lost.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks:
            threading.Timer(_LATER, _again).start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


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
