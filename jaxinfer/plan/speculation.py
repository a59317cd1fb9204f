"""Decoders that check several tokens at once: what they change of a step, analytically."""

import dataclasses

from jaxinfer.errors import InputError, nearest
from jaxinfer.plan.planning import Plan
from jaxinfer.plan.prediction import Times
from jaxinfer.plan.turns import step_of

_DEFAULTS = {"length": 4.0, "acceptance": 0.7, "draft": 0.0}


@dataclasses.dataclass(frozen=True)
class Speculation:
    """Drafts of `length` tokens, each accepted with probability `acceptance`, at `draft` of a step's time a token."""

    length: int
    acceptance: float | int
    draft: float | int

    @property
    def tokens(self) -> float | int:
        """Tokens that a check gives on average: `(1 - a^(k + 1)) / (1 - a)` (2211.17192)."""
        a, k = self.acceptance, self.length
        return k + 1.0 if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def parse_decoder(text: str) -> Speculation | None:
    """Return the decoder of "speculative:length=4,acceptance=0.7,draft=0.05"; None of "" and "greedy".

    Raises:
        InputError: another decoder or option, or a value out of its range.
    """
    name, _, rest = text.partition(":")
    if name in ("", "greedy"):
        return None
    if name != "speculative":
        raise InputError(f"decoder {text!r}: {nearest(name, ('greedy', 'speculative'))}")
    values = dict(_DEFAULTS)
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in values:
            raise InputError(f"decoder {text!r}: no option {key!r}; {nearest(key, values)}")
        try:
            values[key] = float(value)
        except ValueError:
            raise InputError(f"decoder {text!r}: {key}={value!r} must be a number") from None
    length = values["length"]
    if length != int(length) or not 1 <= length <= 64:
        raise InputError(f"decoder {text!r}: length={length:g} must be a whole number from 1 to 64")
    for key in ("acceptance", "draft"):
        if not 0 <= values[key] <= 1:
            raise InputError(f"decoder {text!r}: {key}={values[key]:g} must be from 0 to 1")
    return Speculation(int(length), values["acceptance"], values["draft"])


def check_step(plan: Plan, speculation: Speculation) -> Times | None:
    """Return the times of one check with its drafts; divided by `speculation.tokens`, of a token.

    The check is a step of `length + 1` tokens a row; its collectives carry as many times the bytes, at no more hops.
    The drafts cost their share of a plain step.
    """
    decode = plan.phases["decode"]
    if decode.times is None:
        return None
    hardware = plan.target.topology.hardware
    tokens = speculation.length + 1
    step = step_of(plan.target.built, plan.request.batch, tokens, plan.request.context - tokens)
    times = step.times(decode.times.network * tokens, hardware, decode.launches)
    drafts = speculation.draft * speculation.length
    return times + Times(*(drafts * part for part in dataclasses.astuple(decode.times)))
