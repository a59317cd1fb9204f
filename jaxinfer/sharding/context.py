"""A layer's cache whose slots are divided over devices: each attends over its own, and their parts are merged.

Few queries are whole on every device. Many are divided as the slots are, and go round the ring of devices with what
they have gathered so far, since a cache is larger than they are (ring attention, 2310.01889, of queries: 2411.01783).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxinfer.cache.slots import write
from jaxinfer.ops.attention_parts import Part, join
from jaxinfer.ops.placement import Rules

TILE = 128  # slots, of which kernels read whole blocks


@dataclasses.dataclass(frozen=True)
class Slots:
    """What a device holds of a layer cache, under `shard_map` over the axes `over`: slots of positions that follow.

    The methods are a layer cache's, for the whole rows' positions and lengths; they return the device's layer cache.
    """

    inner: Any
    over: tuple[str, ...]
    divided: bool  # whether the tokens of a call are divided as the slots are: a device has its t of all T

    @property
    def size(self) -> int:
        """How many slots a device holds."""
        return jax.tree.leaves(self.inner)[0].shape[2]

    @property
    def first(self) -> Int[Array, ""]:
        """The position of this device's first slot."""
        return jax.lax.axis_index(self.over) * self.size

    def append(
        self,
        k: Float[Array, "B t K H"],
        v: Float[Array, "B t K H"],
        start: Int[Array, "B"],
        counts: Int[Array, "B"],
    ) -> Any:
        """Append those of the tokens whose slots are here: what a row has from the first of them on."""
        if self.divided:  # here, so that all that makes them is made of a device's own tokens
            k, v = (jax.lax.all_gather(x, self.over, axis=1, tiled=True) for x in (k, v))
        skipped = jnp.clip(self.first - start, 0, counts)
        at = jnp.clip(start - self.first, 0, self.size)
        counts = jnp.clip(counts - skipped, 0, self.size - at)
        T = k.shape[1]
        if T > 1:
            tokens = jnp.minimum(skipped[:, None] + jnp.arange(T), T - 1)[..., None, None]
            k, v = (jnp.take_along_axis(x, tokens, axis=1) for x in (k, v))
        return self.inner.append(k, v, at, counts)

    def attend(
        self, q: Float[Array, "B t N H"], positions: Int[Array, "B T"], **options: Any
    ) -> tuple[Float[Array, "B t N H"], Any]:
        """Attend from the tokens that this device has."""
        attend = functools.partial(self.inner.attend_part, first_slot=self.first, **options)
        out = _around(attend, q, positions, self.over) if self.divided else _merged(attend(q, positions), self.over)
        return out.astype(q.dtype), self.inner

    def rewind(self, length: Int[Array, "B"]) -> Any:
        """Forget the slots here that are past a row's length."""
        return self.inner.rewind(jnp.clip(length - self.first, 0, self.size))

    def keep(self, start: Int[Array, "B"], nodes: Int[Array, "B n"], counts: Int[Array, "B"]) -> Any:
        """Move a path's tokens to the slots of their positions: each is told by the device that has it."""
        at = start[:, None] + nodes - self.first
        here = (at >= 0) & (at < self.size)
        skipped, to = jnp.clip(self.first - start, 0, counts), jnp.clip(start - self.first, 0, self.size)
        counts = jnp.clip(counts - skipped, 0, self.size - to)

        def move(store: Array) -> Array:
            wide = (len(at), 1, -1, *(1,) * (store.ndim - 3))
            found = jnp.take_along_axis(store, jnp.clip(at, 0, self.size - 1).reshape(wide), axis=2)
            found = jnp.where(here.reshape(wide), found, 0).astype(jnp.float32)  # exact for codes of a byte, too
            found = jax.lax.psum(found, self.over).astype(store.dtype)
            order = jnp.minimum(skipped[:, None] + jnp.arange(nodes.shape[1]), nodes.shape[1] - 1)
            return write(store, jnp.take_along_axis(found, order.reshape(wide), axis=2), to, counts)

        return jax.tree.map(move, self.inner)


def slots_on(slots: int, mesh: Mapping[str, int], rules: Rules) -> int:
    """Return the slots to allocate for `slots`: as many on each device, in whole tiles where they are many."""
    ways = math.prod(mesh[axis] for axis in rules.mesh_axes("sequence", mesh))
    if ways == 1:
        return slots
    each = -(-slots // ways)
    return ways * (each if each <= TILE else -(-each // TILE) * TILE)


def _merged(part: Part, over: tuple[str, ...]) -> Float[Array, "B T N H"]:
    """Return attention over all devices' slots, of queries that each of them has attended from."""
    out, lse = part
    weight = jnp.exp(lse - jax.lax.pmax(lse, over))[..., None]
    out, total = jax.lax.psum((out * weight, weight), over)
    return out / total


def _around(attend: Any, q: Array, positions: Array, over: tuple[str, ...]) -> Float[Array, "B t N H"]:
    """Return attention of each device's queries over all devices' slots.

    In step s a device attends from the queries of the one s before it. They go on to the next while it attends, and
    what was gathered for them comes in; in the end that goes home.
    """
    ways, here, t = jax.lax.axis_size(over), jax.lax.axis_index(over), q.shape[1]
    on = functools.partial(jax.lax.ppermute, axis_name=over, perm=[(i, (i + 1) % ways) for i in range(ways)])
    gathered = None
    for step in range(ways):
        following = on(q) if step + 1 < ways else q
        coming = None if gathered is None else jax.tree.map(on, gathered)
        whose = (here - step) % ways
        part = attend(q, jax.lax.dynamic_slice_in_dim(positions, whose * t, t, axis=1))
        gathered = part if coming is None else join(coming, part)
        q = following
    return on(gathered[0].astype(q.dtype))
