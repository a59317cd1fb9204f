"""From next-token logits to a token: greedy, or drawn after temperature, top-k, top-p, min-p and repetition penalty."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxinfer.errors import InputError

Number = float | int | Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. An option that is off is None and leaves no trace in the compiled step.

    Values are traced, so a new temperature or k does not recompile; turning an option on does, once.
    """

    temperature: Number | None = None  # None is greedy
    top_k: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None

    @classmethod
    def of(
        cls,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
    ) -> "Sampling":
        """Check plain numbers and drop every option at its neutral value.

        Raises:
            InputError: a value is outside its range.
        """
        for name, value, ok, range_ in (
            ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0 and top_k == int(top_k), "a whole number, 0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "in (0, 1], 1 is off"),
            ("min_p", min_p, 0 <= min_p < 1, "in [0, 1), 0 is off"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < float("inf"), "above 0, 1 is off"),
        ):
            if not ok:
                raise InputError(f"{name}={value}: must be {range_}")
        penalty = float(repetition_penalty) if repetition_penalty != 1 else None
        if temperature == 0:  # greedy: the filters keep the best token, so they can't change the outcome
            return cls(repetition_penalty=penalty)
        return cls(
            temperature=float(temperature),
            top_k=int(top_k) if top_k > 0 else None,
            top_p=float(top_p) if top_p < 1 else None,
            min_p=float(min_p) if min_p > 0 else None,
            repetition_penalty=penalty,
        )

    def adjust(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        """Return the logits of the distribution that tokens are drawn from; excluded tokens are -inf.

        The order is the usual one: repetition penalty (1909.05858), temperature, top-k, top-p (1904.09751),
        min-p (2407.01082). Ties at a threshold are all kept.
        """
        if self.repetition_penalty is not None:
            penalized = jnp.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = jnp.where(seen, penalized, logits)
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_k is not None:
            k = jnp.minimum(self.top_k, logits.shape[-1])
            logits = _keep_top(logits, jnp.ones_like(logits), k)
        if self.top_p is not None:
            logits = _keep_top(logits, jax.nn.softmax(logits, axis=-1), self.top_p)
        if self.min_p is not None:
            floor = logits.max(axis=-1, keepdims=True) + jnp.log(self.min_p)
            logits = jnp.where(logits >= floor, logits, -jnp.inf)
        return logits

    def draw(
        self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, rng: Key[Array, "B"], count: Int[Array, "B"]
    ) -> Int[Array, "B"]:
        """Return each row's token number count[b]. It depends on the row's own key and count only."""
        return self.pick(self.adjust(logits, seen), rng, count)

    def pick(self, logits: Float[Array, "B V"], rng: Key[Array, "B"], count: Int[Array, "B"]) -> Int[Array, "B"]:
        """Return `draw`'s token of logits that are adjusted already.

        By the Gumbel-max trick: two laws that differ little, drawn from with the same key, often give the same token.
        """
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(jax.random.fold_in)(rng, count)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def _keep_top(logits: Array, mass: Array, enough: Number) -> Array:
    """Mask all but the highest logits whose `mass` reaches `enough`: the fewest that do.

    Finds the threshold by bisection over the bit patterns of the floats, which are ordered as the floats are:
    exact after 32 halvings, and much cheaper than a sort of the vocabulary.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    order = jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)  # ascending with the float

    def halve(_, bounds):
        low, high = bounds  # mass above low is enough, mass above high is not
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        reached = jnp.where(order >= middle, mass, 0).sum(axis=-1, keepdims=True) >= enough
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = order.min(axis=-1, keepdims=True)
    high = order.max(axis=-1, keepdims=True) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    # With mass that never reaches `enough` (rounding) low stays the minimum: everything is kept.
    return jnp.where(order >= low, logits, -jnp.inf)
