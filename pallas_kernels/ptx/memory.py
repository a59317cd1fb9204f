"""The memory that a kernel sees: arrays in global memory, a cluster's shared memory, and boxes of tensors."""

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.ptx.launch import Tensor

GLOBAL = 1 << 44  # where global memory begins
BLOCK = 1 << 18  # addresses from one block's shared memory to the next one's
FIRST = 1024  # what the device keeps of a block's shared memory
_APART = 4096  # nothing of anyone's between two arrays


class Wrong(Exception):
    """What a GPU would not do, or not reliably."""


class Global:
    """Arrays one after another, apart from each other; nothing else may be read or written."""

    def __init__(self, sizes: list[int]):
        starts, end = [], _APART
        for size in sizes:
            starts.append(end)
            end += -(-size // 256) * 256 + _APART
        self.bytes = np.full(end, 0x7F, np.uint8)
        self.theirs = np.zeros(end, bool)
        self.writer = np.zeros(end, np.int32)
        self.starts = starts
        for start, size in zip(starts, sizes, strict=True):
            self.theirs[start : start + size] = True

    def address(self, argument: int) -> int:
        """Return where an argument lies."""
        return GLOBAL + self.starts[argument]

    def part(self, argument: int, size: int) -> NDArray[np.uint8]:
        """Return an argument's bytes."""
        return self.bytes[self.starts[argument] : self.starts[argument] + size]

    def write(self, places: NDArray[np.int64], given: NDArray[np.uint8], writer: int) -> None:
        """Write bytes; what two warps write to one place must be the same, for either may be the last."""
        before = self.writer[places]
        if ((before != 0) & (before != writer) & (self.bytes[places] != given)).any():
            raise Wrong("two warps write to one place of global memory, and not the same")
        self.writer[places] = writer
        self.bytes[places] = given

    def check(self, places: NDArray[np.int64], size: int) -> None:
        """See to it that accesses of `size` bytes are to arrays, and aligned."""
        if places.size and (places.min() < 0 or places.max() + size > len(self.bytes)):
            raise Wrong(f"address {int(places.min()):#x}: outside all arrays")
        if not (self.theirs[places].all() and self.theirs[places + (size - 1)].all()):
            raise Wrong("an access to global memory that is no array's")
        if (places % size).any():
            raise Wrong(f"an access of {size} bytes to global memory that is not aligned")


class Shared:
    """The shared memory of a cluster's blocks, and which warps wrote a byte that copies may not see yet, as bits."""

    def __init__(self, blocks: int, size: int):
        self.blocks, self.size = blocks, FIRST + size
        self.bytes = np.full(blocks * BLOCK, 0x7F, np.uint8)
        self.unseen = np.zeros(blocks * BLOCK, np.uint32)

    def check(self, places: NDArray[np.int64], size: int) -> None:
        """See to it that accesses of `size` bytes are inside, and aligned."""
        inside = places % BLOCK
        if places.size and (places.min() < 0 or places.max() >= self.blocks * BLOCK):
            raise Wrong(f"address {int(places.max()):#x}: outside shared memory")
        if (inside < FIRST).any() or (inside + size > self.size).any():
            raise Wrong(f"an access of {size} bytes outside the {self.size - FIRST} of shared memory")
        if (places % size).any():
            raise Wrong(f"an access of {size} bytes to shared memory that is not aligned")

    def write(self, places: NDArray[np.int64], given: NDArray[np.uint8], warp: int) -> None:
        """Write bytes for a warp of a block, which copies and the matrix units see only after a fence.

        Of warps that write the same to a place one fence is enough.
        """
        me, before = np.uint32(1 << warp), self.unseen[places]
        same = self.bytes[places] == given
        self.unseen[places] = np.where(same, np.where(before, before | me, np.uint32(0)), me)
        self.bytes[places] = given

    def fence(self, block: int, warp: int) -> None:
        """Let copies and the matrix units see what a warp has written to its block's memory."""
        unseen = self.unseen[block * BLOCK : block * BLOCK + self.size]
        unseen[unseen & np.uint32(1 << warp) != 0] = 0

    def seen(self, places: NDArray[np.int64], what: str) -> None:
        """See to it that what is read by a copy or by the matrix units was fenced after it was written."""
        self.check(places.ravel(), 1)
        if self.unseen[places].any():
            raise Wrong(f"{what} reads shared memory that was written without fence.proxy.async after it")


def swizzled(places: NDArray[np.int64], swizzle: int) -> NDArray[np.int64]:
    """Return the addresses where a swizzled tile keeps what else would lie at `places`: chunks of 16 bytes turn."""
    rows = {128: 7, 64: 3, 32: 1}.get(swizzle, 0)
    return places ^ (((places >> 7) & rows) << 4)


def box(tensor: Tensor, start: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return where a box's elements lie in its tensor, and which are inside; `start` has the innermost axis first."""
    grids = np.indices(tensor.box).reshape(len(tensor.box), -1)
    at = np.zeros(grids.shape[1], np.int64)
    inside = np.ones(grids.shape[1], bool)
    for axis, (first, size, stride) in enumerate(zip(reversed(start), tensor.shape, tensor.strides, strict=True)):
        place = grids[axis] + first
        inside &= (place >= 0) & (place < size)
        at += place * stride
    return at + tensor.offset, inside
