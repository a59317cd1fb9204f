"""Doing a thing or leaving it, in place."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

Carry = TypeVar("Carry")


def once(when: Bool[Array, ""], do: Callable[[Carry], Carry], carry: Carry) -> Carry:
    """Return `do(carry)` where `when` is true, and otherwise `carry`.

    What `jax.lax.cond` gives, but a loop of one turn at most: XLA changes what a loop carries in place, and copies what
    a conditional changes, which of a cache would cost a good part of a step.
    """
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.bool_(False), do(c[1])), (when, carry))[1]
