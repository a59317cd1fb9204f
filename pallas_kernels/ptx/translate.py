"""From PTX to Python: a run of instructions without a jump becomes one function on a warp's registers.

A function takes the warp, its registers (a list of arrays of 32 lanes) and which lanes run, or None for all of them. It
returns where the warp goes on: an index, or (condition, index, other index).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.ptx.operands import KINDS, LANES
from pallas_kernels.ptx.parse import Program
from pallas_kernels.ptx.writer import TOGETHER, Writer

# What ends a run: the machine does these, since a warp may have to wait there.
WAITS = ("bar.sync", "barrier.cluster.wait", "mbarrier.try_wait", "ret", "bra")


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel as functions, made when they are first needed."""

    program: Program
    places: dict[str, int]  # of each register, in the list
    made: dict[tuple[int, bool], tuple[Callable[..., Any], int]]

    @classmethod
    def of(cls, program: Program) -> "Code":
        """Return the code of a program."""
        return cls(program, {name: at for at, name in enumerate(program.registers)}, {})

    def registers(self) -> list[np.ndarray]:
        """Return a warp's registers, which hold what no program should use."""
        junk = {"b1": False, "u2": 0x7FFF, "u4": 0x7FFFDEAD, "u8": 0x7FFFDEADDEADDEAD}
        kinds = {"b1": np.bool_, "u2": np.uint16, "u4": np.uint32, "u8": np.uint64}
        full = {kind: np.full(LANES, junk[kind], kinds[kind]) for kind in junk}
        return [full[KINDS[kind]] for kind in self.program.registers.values()]

    def waits(self, at: int) -> bool:
        """Return whether the machine does the instruction itself."""
        return self.program.instructions[at].opcode.startswith(WAITS)

    def together(self, at: int) -> bool:
        """Return whether an instruction needs all lanes that are left."""
        return self.program.instructions[at].opcode.split(".")[0] in TOGETHER

    def run(self, at: int, some: bool) -> tuple[Callable[..., Any], int]:
        """Return the function of the run that starts at an instruction, for `some` lanes, and where the run ends."""
        if (at, some) not in self.made:
            self.made[at, some] = self._make(at, some)
        return self.made[at, some]

    def _make(self, at: int, some: bool) -> tuple[Callable[..., Any], int]:
        writer, start = Writer(self, some), at
        stops = set(self.program.labels.values())
        while at < len(self.program.instructions) and not self.waits(at):
            if at > start and (at in stops or (some and self.together(at))):
                break
            writer.write(self.program.instructions[at])
            at += 1
        return writer.function(f"run_{start}"), at
