"""A GPU of one cluster at a time: warps take turns at random, and copies and products happen early or late.

What no order of a GPU could do is refused (`memory.Wrong`): accesses outside arrays or not aligned, copies that read
what was not fenced, blocks that end before their copies, warps that wait for ever. It knows no time and no caches, one
cluster sees nothing of another, and whether wgmma.fence is where registers need it, it can't say.
"""

import random
from typing import Any

import numpy as np

from pallas_kernels.ptx import memory
from pallas_kernels.ptx.blocks import Cluster
from pallas_kernels.ptx.launch import Launch
from pallas_kernels.ptx.memory import BLOCK, FIRST, Wrong
from pallas_kernels.ptx.translate import Code
from pallas_kernels.ptx.warp import Warp


class Machine:
    """Runs a kernel on arrays. `lateness` is the chance that a copy or a product happens only when somebody waits."""

    def __init__(self, code: Code, launch: Launch, sizes: list[int], lateness: float = 0.5, seed: int = 0):
        self.code, self.launch = code, launch
        self.memory = memory.Global(sizes)
        self.random = random.Random(seed)
        self.lateness = lateness
        self.warps = 0

    def late(self) -> bool:
        return self.random.random() < self.lateness

    def run(self) -> None:
        """Run all blocks.

        Raises:
            Wrong: the kernel does what a GPU would not do, or not reliably.
        """
        grid, shape = self.launch.grid, self.launch.cluster
        corners = [
            (x, y, z)
            for z in range(0, grid[2], shape[2])
            for y in range(0, grid[1], shape[1])
            for x in range(0, grid[0], shape[0])
        ]
        self.random.shuffle(corners)
        with np.errstate(all="ignore"):
            for x, y, z in corners:
                places = [
                    (x + i, y + j, z + k) for k in range(shape[2]) for j in range(shape[1]) for i in range(shape[0])
                ]
                self._run(Cluster(self, places))

    def _run(self, cluster: Cluster) -> None:
        left = list(cluster.warps)
        while left:
            self.random.shuffle(left)
            moved = False
            for warp in left:
                while cluster.pending and not self.late():
                    cluster.pending.pop(self.random.randrange(len(cluster.pending)))()
                moved |= self.advance(warp)
            left = [warp for warp in left if warp.alive.any()]
            if not moved and left:
                if not cluster.pending:
                    raise Wrong("all warps wait: " + "; ".join(self._stands(warp) for warp in left[:12]))
                cluster.pending.pop(self.random.randrange(len(cluster.pending)))()
        if cluster.pending:
            raise Wrong("a cluster ends before its copies have arrived")

    def _stands(self, warp: Warp) -> str:
        at = int(warp.at[warp.alive].min()) if not warp.together else warp.place
        return f"block {warp.block.rank} warp {warp.number} at {at}: {self.code.program.instructions[at]}"

    def advance(self, warp: Warp) -> bool:
        """Run a warp until it has to wait; return whether it got anywhere."""
        moved = False
        while warp.alive.any():
            if not (self._step(warp, warp.place, None) if warp.together else self._scattered(warp)):
                return moved
            moved = True
        return moved

    def _scattered(self, warp: Warp) -> bool:
        """Run the lanes that are farthest behind, or others where these have to wait."""
        for at in np.unique(warp.at[warp.alive]):
            mask = warp.alive & (warp.at == at)
            if self.code.together(int(at)) and not (mask == warp.alive).all():
                continue
            if self._step(warp, int(at), mask):
                places = warp.at[warp.alive]
                if warp.alive.all() and (places == places[0]).all():
                    warp.together, warp.place = True, int(places[0])
                return True
        return False

    def _step(self, warp: Warp, at: int, mask: Any) -> bool:
        if self.code.waits(at):
            where = self._wait(warp, at, mask)
            if where is None:
                return False
        else:
            run, end = self.code.run(at, mask is not None)
            try:
                run(warp, warp.registers, mask)
            except Wrong as wrong:
                raise Wrong(f"{wrong}; {self._stands(warp)}") from None
            where = end
        if isinstance(where, int):
            if mask is None:
                warp.place = where
            else:
                warp.at[mask] = where
            return True
        lanes, there, other = where
        if mask is None:
            if lanes.all() or not lanes.any():
                warp.place = there if lanes[0] else other
                return True
            mask = np.ones(32, bool)
            warp.together = False
        warp.at[mask] = np.where(lanes, there, other)[mask]
        return True

    def _wait(self, warp: Warp, at: int, mask: Any) -> Any:
        """Do an instruction that ends a run; return where the warp goes on, or None where it has to wait."""
        one, code = self.code.program.instructions[at], self.code
        if one.opcode.startswith(("bra", "ret")):
            lanes = np.ones(32, bool) if mask is None else mask
            if one.guard is not None:
                condition = warp.registers[code.places[one.guard]]
                taken = ~condition if one.negated else condition
            else:
                taken = np.ones(32, bool)
            if one.opcode.startswith("bra"):
                return (taken, code.program.labels[one.operands[0]], at + 1)
            warp.alive &= ~(taken & lanes)
            if warp.together and not warp.alive.all():
                warp.together = False
                warp.at[:] = at + 1
            if not warp.alive.any():
                warp.end()
            return at + 1
        if one.guard is not None:
            raise NotImplementedError(f"{one}: a wait under a condition is not known here")
        if one.opcode.startswith("bar.sync"):
            if warp.waits is None:
                number = self._number(warp, one.operands[0])
                threads = self._number(warp, one.operands[1]) if len(one.operands) > 1 else self.launch.threads
                warp.waits = (number, warp.block.stand(number, threads))
            number, turn = warp.waits
            if warp.block.turns.get(number, 0) < turn:
                return None
            warp.waits = None
            return at + 1
        if one.opcode.startswith("barrier.cluster.wait"):
            return at + 1 if warp.cluster.arrivals >= warp.arrived else None
        return self._try_wait(warp, at, mask)

    def _try_wait(self, warp: Warp, at: int, mask: Any) -> Any:
        one = self.code.program.instructions[at]
        lane = 0 if mask is None else int(np.argmax(mask))
        parity = self._number(warp, one.operands[2], lane)
        barrier = warp.cluster.barrier(self._number(warp, one.operands[1].strip("[]"), lane))
        if barrier.phase % 2 == parity % 2:
            return None
        place = self.code.places[one.operands[0]]
        warp.registers[place] = np.ones(32, bool) if mask is None else warp.registers[place] | mask
        return at + 1

    def _number(self, warp: Warp, text: str, lane: int = 0) -> int:
        base, _, offset = text.partition("+")
        if base in self.code.places:
            return int(warp.registers[self.code.places[base]][lane]) + int(offset or 0)
        if base in self.code.program.shared:
            return warp.block.rank * BLOCK + FIRST + int(offset or 0)
        return int(base, 0)
