"""Tracing for a device that is not here."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax


class Assumption:
    """A device that is traced for whatever the devices are: `with assume("h100"): jax.jit(f).lower(...)`."""

    def __init__(self, what: str, known: Mapping[str, Any]):
        self._what, self._known = what, known
        self._name = jax.make_user_context(None)  # part of the key of every traced function

    @property
    def value(self) -> Any:
        """The device that is assumed, or None."""
        return None if self._name.value is None else self._known[self._name.value]

    def __call__(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the device of this name is assumed, and which gives it.

        Raises:
            ValueError: none has this name.
        """
        if name not in self._known:
            raise ValueError(f"{self._what}={name!r}: must be one of {', '.join(self._known)}")
        return self._assumed(name)

    @contextlib.contextmanager
    def _assumed(self, name: str) -> Iterator[Any]:
        with self._name(name):
            yield self._known[name]
