"""A running softmax in VMEM: blocks of slots come one after the other, and nothing is kept of them but their sums.

Scores are in base 2: exp2 is what the hardware has.
"""

import math

import jax.numpy as jnp

from pallas_kernels import compat

LOG2E = math.log2(math.e)
NOTHING = -1e30  # the score of a slot that is not seen
LEAST = -1e20  # where the peak begins: what is not seen has a weight of exactly 0, also before anything is seen


class Softmax:
    """The softmax of some query rows and the sum of values under it (online softmax, 1805.02867)."""

    def __init__(self, peak, total, acc, *, scale: float, softcap: float | None):
        self._peak, self._total, self._acc = peak, total, acc
        self._scale, self._softcap = scale, softcap

    @staticmethod
    def scratch(rows: int, H: int) -> list:
        """Return the shapes of what it is kept in."""
        return [*[compat.VMEM((rows, 128), jnp.float32)] * 2, compat.VMEM((rows, H), jnp.float32)]

    def begin(self) -> None:
        """Forget all blocks."""
        self._peak[...] = jnp.full_like(self._peak, LEAST)
        self._total[...] = jnp.zeros_like(self._total)
        self._acc[...] = jnp.zeros_like(self._acc)

    def add(self, scores, mix, seen=None) -> None:
        """Take a block in: `scores` `[rows, slots]` are the bare products, `mix(weights)` weights its values."""
        if self._softcap is None:
            scores *= self._scale * LOG2E
        else:
            scores = (self._softcap * LOG2E) * jnp.tanh(scores * (self._scale / self._softcap))
        if seen is not None:
            scores = jnp.where(seen, scores, NOTHING)
        before = self._peak[:, :1]
        peak = jnp.maximum(before, scores.max(axis=1, keepdims=True))
        weights = jnp.exp2(scores - peak)
        shrink = jnp.exp2(before - peak)
        self._total[...] = self._total[...] * shrink + weights.sum(axis=1, keepdims=True)
        self._peak[...] = jnp.broadcast_to(peak, self._peak.shape)
        self._acc[...] = self._acc[...] * shrink + mix(weights)

    def result(self):
        """Return the output `[rows, H]` and the natural logarithm of the total `[rows, 1]`, 0 and -inf for no slot."""
        total = self._total[:, :1]
        safe = jnp.where(total == 0, 1.0, total)
        lse = jnp.where(total == 0, -jnp.inf, self._peak[:, :1] / LOG2E + jnp.log(safe))
        return self._acc[...] / safe, lse
