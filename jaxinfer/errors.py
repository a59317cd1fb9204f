"""The error a user's bad input gets: one line with the value, the constraint and the fix."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: a file, a key, an option. The command line prints it and exits with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that names the known names nearest to `name`, or all of them when none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known)
