"""The pages of the KV cache: which are free, and which belong to whom."""

from __future__ import annotations


class BlockPool:
    """A free list of the blocks 0 to `num_blocks` - 1, each of which holds `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def can_grow(self, table: list[int], num_tokens: int) -> bool:
        """Whether `table` could be extended to hold `num_tokens` tokens."""
        return self.blocks_for(num_tokens) - len(table) <= len(self._free)

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Extend `table` to hold `num_tokens` tokens."""
        assert self.can_grow(table, num_tokens)
        while len(table) < self.blocks_for(num_tokens):
            table.append(self._free.pop())

    def free(self, table: list[int]) -> None:
        """Take back all blocks of `table` and empty it."""
        self._free.extend(reversed(table))
        assert len(self._free) <= self.num_blocks
        table.clear()
