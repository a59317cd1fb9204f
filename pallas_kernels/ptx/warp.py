"""A warp: its registers, where its lanes are, and what the instructions ask of it besides arithmetic."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.ptx import matrices
from pallas_kernels.ptx.launch import Tensor
from pallas_kernels.ptx.memory import BLOCK, FIRST, GLOBAL, Wrong

if TYPE_CHECKING:
    from pallas_kernels.ptx.blocks import Block

PARAMETERS = 1 << 50  # where the parameters lie, each at a multiple of 64 KiB
_ALL = np.ones(32, bool)
_LANE = np.arange(32)
Mask = NDArray[np.bool_] | None


def _lanes(mask: Mask) -> list[int]:
    return list(range(32)) if mask is None else np.flatnonzero(mask).tolist()


class Warp:
    """32 lanes of a block."""

    def __init__(self, block: "Block", number: int):
        self.block, self.cluster, self.number = block, block.cluster, number
        self.machine = block.cluster.machine
        self.machine.warps += 1
        self.name = self.machine.warps
        self.registers = self.machine.code.registers()
        self.at = np.zeros(32, np.int64)  # of each lane, the instruction that is next
        self.alive = _ALL.copy()
        self.together = True  # all lanes are alive, and at the same place
        self.place = 0
        self.waits: Any = None  # for what, where a barrier was told already that this warp is here
        self.arrived = 0
        self.issued: list[Any] = []  # products, and then groups of them, that nobody waited for yet
        self.groups: list[list[Any]] = []
        self.stores: dict[int, list[Any]] = {}  # of each lane: bulk copies, and groups of them
        self.special = {f"%{name}": np.full(32, value, np.uint32) for name, value in block.special.items()}
        self.special["%tid.x"] = (32 * number + _LANE).astype(np.uint32)
        self.special["%laneid"] = _LANE.astype(np.uint32)

    # Addresses.

    def shared_base(self, kind: Any) -> NDArray:
        return np.full(32, self.block.rank * BLOCK + FIRST, kind)

    def parameter(self, number: int) -> NDArray[np.uint64]:
        argument = self.machine.launch.parameters[number]
        return np.full(32, self.machine.memory.address(argument), np.uint64)

    def parameter_address(self, number: int) -> NDArray[np.uint64]:
        return np.full(32, PARAMETERS + (number << 16), np.uint64)

    def _tensor(self, address: int) -> Tensor:
        number, place = divmod(address - PARAMETERS, 1 << 16)
        tensors = self.machine.launch.parameters[number]
        if isinstance(tensors, int) or place % 128:
            raise Wrong(f"address {address:#x}: no tensor's descriptor lies there")
        return tensors[place // 128]

    def of_rank(self, address: NDArray[np.uint32], rank: NDArray[np.uint32]) -> NDArray[np.uint32]:
        if (rank >= len(self.cluster.blocks)).any():
            raise Wrong(f"mapa to block {int(rank.max())} of a cluster of {len(self.cluster.blocks)}")
        return (address % np.uint32(BLOCK)) + rank * np.uint32(BLOCK)

    # Loads and stores.

    def load(self, space: str, at: NDArray[np.int64], kind: Any, count: int, mask: Mask) -> list[NDArray]:
        lanes = slice(None) if mask is None else mask
        at, size = at[lanes], np.dtype(kind).itemsize
        where, at = self._where(space, at)
        where.check(at, size * count)
        values = where.bytes.view(kind)[at[:, None] // size + np.arange(count)]
        if mask is None:
            return [values[:, n] for n in range(count)]
        found = np.zeros((count, 32), kind)
        found[:, lanes] = values.T
        return list(found)

    def store(self, space: str, at: NDArray[np.int64], values: list[NDArray], mask: Mask) -> None:
        lanes = slice(None) if mask is None else mask
        at, size = at[lanes], values[0].dtype.itemsize
        where, at = self._where(space, at)
        where.check(at, size * len(values))
        given = np.ascontiguousarray(np.stack(values, axis=1)[lanes]).view(np.uint8)
        places = at[:, None] + np.arange(size * len(values))
        where.write(places, given, self.number if where is self.cluster.shared else self.name)

    def load_matrices(self, at: NDArray[np.int64], count: int, turned: bool) -> list[NDArray]:
        """Return matrices of 8 by 8 halves: lanes 8 i and on say where the rows of the i-th lie, of 16 bytes each."""
        rows = at[: 8 * count]
        self.cluster.shared.check(rows, 16)
        halves = self.cluster.shared.bytes.view(np.uint16)[rows[:, None] // 2 + np.arange(8)].reshape(count, 8, 8)
        halves = halves.swapaxes(1, 2) if turned else halves
        return [np.ascontiguousarray(x).view(np.uint32).reshape(32) for x in halves]

    def store_matrices(self, at: NDArray[np.int64], values: list[NDArray], turned: bool) -> None:
        """Write what `load_matrices` would return."""
        rows = at[: 8 * len(values)]
        self.cluster.shared.check(rows, 16)
        halves = np.stack([np.ascontiguousarray(x).view(np.uint16).reshape(8, 8) for x in values])
        halves = np.ascontiguousarray(halves.swapaxes(1, 2) if turned else halves).reshape(-1, 8)
        self.cluster.shared.write(rows[:, None] + np.arange(16), halves.view(np.uint8), self.number)

    def _where(self, space: str, at: NDArray[np.int64]) -> tuple[Any, NDArray[np.int64]]:
        if space == "any":
            space = "global" if len(at) and at[0] >= GLOBAL else "shared"
        return (self.machine.memory, at - GLOBAL) if space == "global" else (self.cluster.shared, at)

    def fence(self) -> None:
        self.cluster.shared.fence(self.block.rank, self.number)

    # What lanes do together.

    def elect(self, mask: Mask) -> tuple[NDArray, NDArray]:
        first = int(np.argmax(_ALL if mask is None else mask))
        return np.full(32, first, np.uint32), first == _LANE

    def shuffle(self, how: str, x: NDArray, b: NDArray, wide: NDArray, mask: Mask) -> tuple[NDArray, NDArray]:
        if (wide != 31).any():
            raise NotImplementedError(f"shfl of parts of a warp: c={int(wide[0])}")
        source = (_LANE ^ b if how == "bfly" else b & 31).astype(np.int64)
        if mask is not None and not mask[source[mask]].all():
            raise Wrong("shfl from a lane that is not there")
        return x[source], np.ones(32, bool)

    def mma(self, kind: str, a: list, b: list, c: list) -> NDArray[np.uint32]:
        return matrices.mma(kind, np.stack(a), np.stack(b), np.stack(c))

    # Products of a warpgroup: each warp makes its own 16 rows of 64.

    def wgmma(
        self, width: int, kind: str, targets: list[int], a: Any, b: NDArray, add: NDArray, flags: list[int]
    ) -> None:
        def product() -> None:
            depth, turns = 16, flags[2:]
            if isinstance(a, list):
                left = matrices.rows_of_a(np.stack([self.registers[x] for x in a]), kind)
            else:
                places = matrices.tile(int(a[0]), 64, depth, bool(turns[0]))[16 * (self.number % 4) :][:16]
                left = self._entries(places, kind)
            right = self._entries(matrices.tile(int(b[0]), width, depth, bool(turns[-1])), kind)
            sums = left.astype(np.float32) @ right.T
            if add[0]:
                sums = sums + matrices.of_fragment(np.stack([self.registers[x] for x in targets]).view(np.float32))
            for place, x in zip(targets, matrices.to_fragment(sums.astype(np.float32)), strict=True):
                self.registers[place] = x.view(np.uint32)

        if flags[:2] != [1, 1]:
            raise NotImplementedError(f"wgmma with signs {flags[:2]}")
        if self.machine.late():
            self.issued.append(product)
        else:
            product()

    def _entries(self, places: NDArray[np.int64], kind: str) -> NDArray[np.float32]:
        shared, places = self.cluster.shared, places + self.block.rank * BLOCK
        shared.seen(places, "wgmma")
        return matrices.wide(shared.bytes.view(np.uint16)[places // 2].astype(np.uint32), kind)[..., 0]

    def wgmma_commit(self) -> None:
        self.groups.append(self.issued)
        self.issued = []

    def wgmma_wait(self, left: int) -> None:
        while len(self.groups) > left:
            for product in self.groups.pop(0):
                product()

    # Barriers that no instruction waits at.

    def init(self, at: NDArray[np.int64], count: NDArray[np.uint32], mask: Mask) -> None:
        for lane in _lanes(mask):
            self.cluster.barrier_at(int(at[lane]), int(count[lane]))

    def arrive(self, at: NDArray[np.int64], count: NDArray[np.uint32], expected: bool, mask: Mask) -> None:
        for lane in _lanes(mask):
            barrier = self.cluster.barrier(int(at[lane]))
            if expected:
                barrier.expect(int(count[lane]))
            barrier.arrive(1 if expected else int(count[lane]))

    def cluster_arrive(self) -> None:
        self.arrived = self.cluster.arrive()

    # Copies.

    def tensor_load(self, to: NDArray, what: NDArray, where: list[NDArray], barrier: NDArray, mask: Mask) -> None:
        for lane in _lanes(mask):
            tensor = self._tensor(int(what[lane]))
            start = tuple(int(x[lane]) for x in where)
            self.cluster.copy_in(tensor, start, int(to[lane]), int(barrier[lane]))

    def tensor_store(self, what: NDArray, where: list[NDArray], source: NDArray, mask: Mask) -> None:
        for lane in _lanes(mask):
            tensor = self._tensor(int(what[lane]))
            start = tuple(int(x[lane]) for x in where)
            self._issue(lane, self.cluster.copy_out(tensor, start, int(source[lane]), self.name))

    def bulk_store(self, to: NDArray, source: NDArray, size: NDArray, mask: Mask) -> None:
        for lane in _lanes(mask):
            there, here = int(to[lane]) - GLOBAL, int(source[lane])
            self._issue(lane, self.cluster.copy_bytes(there, here, int(size[lane]), self.name))

    def _issue(self, lane: int, copy: Any) -> None:
        if not self.machine.late():
            copy()
            copy = None
        self.stores.setdefault(lane, [[]])[-1].append(copy)

    def bulk_commit(self, mask: Mask) -> None:
        for lane in _lanes(mask):
            self.stores.setdefault(lane, [[]]).append([])

    def bulk_wait(self, left: int, mask: Mask) -> None:
        for lane in _lanes(mask):
            groups = self.stores.get(lane, [[]])
            while len(groups) > left + 1:
                for copy in groups.pop(0):
                    if copy is not None:
                        copy()

    def end(self) -> None:
        """See to it that nothing is under way that reads the memory of a block that ends."""
        if any(copy is not None for groups in self.stores.values() for group in groups for copy in group):
            raise Wrong("a block ends before its copies have read its shared memory")
        if self.issued or any(self.groups):
            raise Wrong("a block ends before its products are done")
