"""What drafters propose, what they are told of it, and what speculation keeps between its steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float, Int, Key

from jaxinfer.cache.base import Cache
from jaxinfer.decode.base import State
from jaxinfer.decode.pace import Costs, Pace
from jaxinfer.models.transformer import Transformer


class Known(NamedTuple):
    """The tokens of each row, prompt and output, of which the newest is not in the target's cache yet."""

    tokens: Int[Array, "B C"]
    length: Int[Array, "B"]


class Begun(NamedTuple):
    """A check that the drafter has begun: what the target's first layers make of the newest token and the draft."""

    hidden: Float[Array, "B N D"]
    cache: Cache  # these layers' with all N tokens in, the others' and the length as they were


class Draft(NamedTuple):
    """Tokens that may follow: g nodes of a tree below the newest token, the first count[b] of which row b has.

    `laws[:, i]` is what the children of node i were drawn from; None where they were chosen and not drawn. `trust` is
    the drafter's own class of how good its draft is, for each row; their acceptance is learned class by class.
    """

    tokens: Int[Array, "B g"]
    count: Int[Array, "B"]
    laws: Float[Array, "B g V"] | None = None
    trust: Int[Array, "B"] | None = None
    begun: Begun | None = None


class Outcome(NamedTuple):
    """What became of a draft: N nodes were checked, of which the first is the newest token that was known before."""

    tokens: Int[Array, "B N"]
    count: Int[Array, "B"]  # drafted nodes that were checked; -1 where the row is done
    best: Int[Array, "B N"]  # the target's likeliest token after each node
    last: Int[Array, "B"]  # the last node that stands
    features: tuple[Float[Array, "B N D"], ...]  # the outputs of the layers that the drafter wants, of each node


@runtime_checkable
class Drafter(Protocol):
    """What proposes tokens. It has a state of its own, a tree of arrays, and sees the target's.

    Three more things may be there: `wants`, numbers of the target's layers whose outputs `settle` is to be told;
    `hopes`, what share of its drafts is expected to stand before any was seen, one for each class of trust
    it has (0.6, one class); `widths`, draft lengths that it can be asked for.
    """

    @property
    def parents(self) -> tuple[int, ...]:
        """The tree of what it proposes at most: node 0 is the newest token, node i > 0 hangs on parents[i] < i."""

    def prepare(self, model: Transformer, rows: Sequence[Sequence[int]], slots: int) -> Any:
        """Return its state for prompts that a cache of `slots` slots holds; on the host."""

    def propose(
        self, model: Transformer, own: Any, known: Known, state: State, keys: Key[Array, "B"], width: Int[Array, ""]
    ) -> tuple[Draft, Any]:
        """Return a draft, of which no more than the first `width` nodes will be looked at, and its state."""

    def settle(self, own: Any, known: Known, outcome: Outcome | None) -> Any:
        """Return its state when all that is known stands, and nothing that it drafted beyond it.

        The outcome is None where nothing was checked.
        """


@nnx.dataclass
class Speculation(nnx.Module):
    """What speculation keeps between its steps."""

    known: Known = nnx.data()
    drafter: Any = nnx.data()
    steps: Int[Array, "B"] = nnx.data()  # that each row has taken part in
    checked: Int[Array, "n"] = nnx.data()  # steps by the width of their check
    pace: Pace | None = nnx.data()  # None: always the whole draft
    costs: Costs | None = nnx.data()

    def replace(self, **changes) -> "Speculation":
        """Return one with some fields changed."""
        return Speculation(**{**{name: getattr(self, name) for name in Speculation.__annotations__}, **changes})
