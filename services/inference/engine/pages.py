"""Which KV blocks have memory: taken from the device budget, and given back to it, in extents."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Protocol

from services.inference.adapters.device_budget import DeviceBudget


class PageMemory(Protocol):
    """The memory behind the blocks, `extent_blocks` of them at a time."""

    num_blocks: int
    extent_blocks: int
    block_bytes: int

    def release(self, extent: int) -> None:
        """Give the memory of an extent back to the system; it reads as zeros when it is next used."""


class Pages:
    """The free blocks, and the extents that hold bytes of the budget (`held`).

    An extent is the unit of memory: it is taken when the free blocks run out, and can be given back when none
    of its blocks is used. Low extents are filled first, so that high ones empty. Not thread-safe: the pool
    that owns it holds the budget's lock.
    """

    def __init__(self, memory: PageMemory, budget: DeviceBudget) -> None:
        self._memory = memory
        self._budget = budget
        self._free: list[int] = []
        self._used = [0] * -(-memory.num_blocks // memory.extent_blocks)
        self.held: set[int] = set()
        self._unheld_blocks = memory.num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses, with memory or without."""
        return len(self._free) + self._unheld_blocks

    @property
    def num_ready(self) -> int:
        """Blocks that nobody uses and that have memory."""
        return len(self._free)

    def extent_of(self, block: int) -> int:
        """Return the extent that `block` lies in."""
        return block // self._memory.extent_blocks

    def extent_bytes(self, extent: int) -> int:
        """Return the bytes of an extent; the last one may be short."""
        return self._size(extent) * self._memory.block_bytes

    def blocks_within(self, size_bytes: int) -> int:
        """Return how many blocks without memory could have it for `size_bytes`."""
        blocks = 0
        for extent in self._unheld():
            if (blocks + self._size(extent)) * self._memory.block_bytes > size_bytes:
                break
            blocks += self._size(extent)
        return blocks

    def take(self) -> int | None:
        """Take a free block, in a new extent if need be; None where the budget has no room for one."""
        if not self._free and not self._extend():
            return None
        block = heapq.heappop(self._free)
        self._used[self.extent_of(block)] += 1
        return block

    def put(self, block: int) -> None:
        """Take a block back; its extent keeps its memory."""
        heapq.heappush(self._free, block)
        self._used[self.extent_of(block)] -= 1
        assert self._used[self.extent_of(block)] >= 0

    def empty_extent(self) -> int | None:
        """Return the highest extent that has memory and no used block."""
        return max((extent for extent in self.held if not self._used[extent]), default=None)

    def release(self, extent: int) -> None:
        """Give an extent without used blocks back."""
        assert not self._used[extent]
        self._free = [block for block in self._free if self.extent_of(block) != extent]
        heapq.heapify(self._free)
        self.held.remove(extent)
        self._unheld_blocks += self._size(extent)
        self._memory.release(extent)
        self._budget.give_back_kv(self.extent_bytes(extent))

    def _extend(self) -> bool:
        extent = next(self._unheld(), None)
        if extent is None or not self._budget.take_kv(self.extent_bytes(extent)):
            return False
        first = extent * self._memory.extent_blocks
        for block in range(first, first + self._size(extent)):
            heapq.heappush(self._free, block)
        self.held.add(extent)
        self._unheld_blocks -= self._size(extent)
        return True

    def _unheld(self) -> Iterator[int]:
        return (extent for extent in range(len(self._used)) if extent not in self.held)

    def _size(self, extent: int) -> int:
        first = extent * self._memory.extent_blocks
        return min(self._memory.extent_blocks, self._memory.num_blocks - first)
