"""A cluster's blocks: their barriers, their warps, and the copies that are under way."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pallas_kernels.ptx import memory
from pallas_kernels.ptx.launch import Tensor
from pallas_kernels.ptx.memory import Wrong
from pallas_kernels.ptx.warp import Warp

if TYPE_CHECKING:
    from pallas_kernels.ptx.machine import Machine


@dataclasses.dataclass
class Barrier:
    """An mbarrier: how many arrivals and bytes its phase still lacks."""

    count: int
    left: int
    bytes: int = 0
    phase: int = 0

    def expect(self, size: int) -> None:
        self.bytes += size

    def arrive(self, count: int) -> None:
        if count > self.left:
            raise Wrong(f"more than the {self.count} arrivals of a barrier's phase")
        self.left -= count
        self.turn()

    def complete(self, size: int) -> None:
        self.bytes -= size
        self.turn()

    def turn(self) -> None:
        if not self.left and not self.bytes:
            self.left = self.count
            self.phase += 1


class Block:
    """A block's warps, and those of them that stand at its numbered barriers."""

    def __init__(self, cluster: "Cluster", rank: int, place: tuple[int, int, int]):
        self.cluster, self.rank = cluster, rank
        launch = cluster.machine.launch
        inside = [p % c for p, c in zip(place, launch.cluster, strict=True)]
        self.special = {"cluster_ctarank": rank, "ntid.x": launch.threads}
        for axis, letter in enumerate("xyz"):
            self.special |= {f"ctaid.{letter}": place[axis], f"nctaid.{letter}": launch.grid[axis]}
            self.special |= {f"cluster_ctaid.{letter}": inside[axis]}
            self.special |= {f"cluster_nctaid.{letter}": launch.cluster[axis]}
        self.standing: dict[int, int] = {}
        self.turns: dict[int, int] = {}
        self.warps = [Warp(self, n) for n in range(launch.threads // 32)]

    def stand(self, number: int, threads: int) -> int:
        """Let a warp arrive at a barrier; return the turn that it waits for."""
        turn = self.turns.get(number, 0) + 1
        here = self.standing.get(number, 0) + 32
        self.standing[number] = here % threads
        if here == threads:
            self.turns[number] = turn
        return turn


class Cluster:
    """Blocks that see each other's shared memory."""

    def __init__(self, machine: "Machine", places: list[tuple[int, int, int]]):
        self.machine = machine
        self.shared = memory.Shared(len(places), machine.launch.shared)
        self.barriers: dict[int, Barrier] = {}
        self.pending: list[Callable[[], None]] = []
        self.arrivals = 0
        self.blocks = [Block(self, rank, place) for rank, place in enumerate(places)]
        self.warps = [warp for block in self.blocks for warp in block.warps]

    def barrier_at(self, at: int, count: int) -> None:
        self.barriers[at] = Barrier(count, count)

    def barrier(self, at: int) -> Barrier:
        if at not in self.barriers:
            raise Wrong(f"{at:#x}: no barrier was made there")
        return self.barriers[at]

    def arrive(self) -> int:
        """Let a warp arrive at the cluster's barrier; return the arrivals that it waits for."""
        self.arrivals += 1
        return -(-self.arrivals // len(self.warps)) * len(self.warps)

    def _box(self, tensor: Tensor, start: tuple[int, ...], at: int) -> tuple[Any, Any, Any]:
        """Return where the bytes of a box are in global and in shared memory, and which are inside the tensor."""
        if at % 16 or (tensor.swizzle > 16 and at % tensor.swizzle):
            raise Wrong(f"a copy to {at:#x}: not aligned")
        elements, inside = memory.box(tensor, start)
        each = np.arange(tensor.element)
        there = self.machine.memory.starts[tensor.argument] + elements[:, None] * tensor.element + each
        here = memory.swizzled(at + np.arange(there.size), tensor.swizzle).reshape(there.shape)
        self.shared.check(here.ravel(), 1)
        return there, here, inside

    def copy_in(self, tensor: Tensor, start: tuple[int, ...], at: int, barrier: int) -> None:
        """Copy a box of a tensor to shared memory, now or later; what is outside the tensor is zeros."""
        there, here, inside = self._box(tensor, start, at)

        def copy() -> None:
            self.machine.memory.check(there[inside].ravel(), 1)
            self.shared.bytes[here[~inside]] = 0
            self.shared.bytes[here[inside]] = self.machine.memory.bytes[there[inside]]
            self.shared.unseen[here] = 0
            self.barrier(barrier).complete(here.size)

        if self.machine.late():
            self.pending.append(copy)
        else:
            copy()

    def copy_out(self, tensor: Tensor, start: tuple[int, ...], at: int, writer: int) -> Callable[[], None]:
        """Return what copies a box to a tensor from shared memory."""
        there, here, inside = self._box(tensor, start, at)

        def copy() -> None:
            self.machine.memory.check(there[inside].ravel(), 1)
            self.shared.seen(here, "a copy")
            self.machine.memory.write(there[inside], self.shared.bytes[here[inside]], writer)

        return copy

    def copy_bytes(self, to: int, at: int, size: int, writer: int) -> Callable[[], None]:
        """Return what copies bytes from shared to global memory."""
        if to % 16 or at % 16 or size % 16:
            raise Wrong(f"a copy of {size} bytes from {at:#x}: not aligned")

        def copy() -> None:
            places = at + np.arange(size)
            there = to + np.arange(size)
            self.machine.memory.check(there, 1)
            self.shared.seen(places, "a copy")
            self.machine.memory.write(there, self.shared.bytes[places], writer)

        return copy
