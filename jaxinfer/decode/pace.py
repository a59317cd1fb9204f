"""How much to draft: what a check is expected to keep, as learned while decoding, against what it costs here."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxinfer.ops.token_tree import TokenTree

MEMORY = 1 - 1 / 48  # of what was learned, what one step leaves: a text changes, and what was bad may be good again
PRIOR = 4.0  # drafts that were seen before any was
HOPE = 0.6  # the share of them that stood, where a drafter knows none: enough to try, where a check is not too dear


class Costs(NamedTuple):
    """What things take on this device, in passes of the target over one token."""

    check: Float[Array, "n"]  # a pass over the newest token and a draft of each width
    draft: Float[Array, "n"]  # making a draft of each width


@nnx.dataclass
class Pace(nnx.Module):
    """How often node i of a draft stood where its parent did, for each class of trust; old news counts for less."""

    stood: Float[Array, "C N"] = nnx.data()
    tried: Float[Array, "C N"] = nnx.data()
    hopes: Float[Array, "C"] = nnx.data()  # the share that is expected to stand before any was seen

    @classmethod
    def new(cls, hopes: Sequence[float], nodes: int) -> "Pace":
        """Return one that has seen nothing."""
        return cls(stood=jnp.zeros((len(hopes), nodes)), tried=jnp.zeros((len(hopes), nodes)), hopes=jnp.asarray(hopes))

    def odds(self) -> Float[Array, "C N"]:
        """Return the probability that each node stands where its parent does."""
        # A node that was hardly ever reached is as good as its whole class.
        whole = (self.stood.sum(axis=1) + self.hopes * PRIOR) / (self.tried.sum(axis=1) + PRIOR)
        return (self.stood + whole[:, None] * PRIOR) / (self.tried + PRIOR)

    def gains(self, parents: tuple[int, ...], widths: tuple[int, ...]) -> Float[Array, "C n"]:
        """Return how many drafted tokens are expected to stand of the first `width` nodes, for each class."""
        odds, stands, gains = self.odds(), [jnp.ones(len(self.stood))], []
        for node in range(1, len(parents)):
            stands.append(stands[parents[node]] * odds[:, node])
        depth = TokenTree.of(parents).depth
        for width in widths:
            # One path stands at most: at each depth the chances of all nodes there add up, to 1 at most.
            levels = [[stands[i] for i in range(1, width + 1) if depth[i] == d] for d in range(1, depth.max() + 1)]
            gains.append(sum((jnp.minimum(sum(level), 1) for level in levels if level), jnp.zeros(len(self.stood))))
        return jnp.stack(gains, axis=1)

    def learn(
        self, parents: tuple[int, ...], trust: Int[Array, "B"], count: Int[Array, "B"], last: Int[Array, "B"]
    ) -> "Pace":
        """Return what is known after a step: row b checked its first count[b] nodes, and those up to last[b] stood."""
        nodes = len(parents)
        on_path = jnp.asarray(TokenTree.of(parents).ancestors)[last]  # [B, N]
        reached = on_path[:, jnp.maximum(jnp.asarray(parents), 0)] & (jnp.arange(nodes) <= count[:, None])
        reached = reached.at[:, 0].set(False)
        rows = jnp.arange(len(self.stood))[:, None] == trust  # [C, B]
        tried = jnp.einsum("cb,bn->cn", rows.astype(jnp.float32), reached.astype(jnp.float32))
        stood = jnp.einsum("cb,bn->cn", rows.astype(jnp.float32), (reached & on_path).astype(jnp.float32))
        return Pace(stood=MEMORY * self.stood + stood, tried=MEMORY * self.tried + tried, hopes=self.hopes)


def widths_of(nodes: int) -> tuple[int, ...]:
    """Return the draft widths that a step chooses from: none, all, and between them those that fill 2, 4, 8 or 16 rows.

    A pass over the newest token and a draft is a product of one row more than the draft is wide, and kernels take rows
    by powers of two. Each width compiles a pass of its own.
    """
    return (0, *(rows - 1 for rows in (2, 4, 8, 16) if rows - 1 < nodes), nodes)


def choose_width(gain: Float[Array, "n"], rows: Int[Array, ""] | int, costs: Costs, drafted: bool) -> Int[Array, ""]:
    """Return which width gives the most tokens for its time, where `rows` rows gain `gain` drafted tokens in all.

    `drafted` says that the draft is there already, and paid for.
    """
    spent = costs.check + (0 if drafted else costs.draft)
    return jnp.argmax((rows + gain) / spent).astype(jnp.int32)
