"""The blocks of the KV cache: which are free, who holds which, and which can be found again by their tokens.

A block is free, live (in one or more block tables) or idle: in no table, but known to the prefix cache and
reused, least recently used first, when a free one is wanted. Only full blocks are known, and a sequence only
writes after what it has computed, so no block that two tables share is ever written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from services.inference.adapters.device_budget import DeviceBudget
from services.inference.engine.pages import PageMemory, Pages
from services.inference.engine.prefix import Chain, PrefixCache

_SHORTEST_AGE_SECONDS = 1e-3


class BlockPool:
    """Gives out blocks of `block_size` tokens; the KV side of the device budget.

    `seconds_per_token` is what computing one prompt token costs; its owner keeps it true.
    """

    def __init__(
        self,
        memory: PageMemory,
        block_size: int,
        budget: DeviceBudget,
        *,
        is_caching: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_blocks = memory.num_blocks
        self.block_size = block_size
        self.is_caching = is_caching
        self.seconds_per_token = 0.0
        self._block_bytes = memory.block_bytes
        self._budget = budget
        self._clock = clock
        self._pages = Pages(memory, budget)
        self._cache = PrefixCache()
        self._holders: dict[int, int] = {}
        self._lock = budget.lock
        budget.kv = self

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return self._pages.num_free

    @property
    def num_idle(self) -> int:
        """Blocks that no table holds and that may be found again."""
        return self._cache.num_idle

    @property
    def num_live(self) -> int:
        """Blocks in tables, each counted once."""
        return len(self._holders)

    def blocks_for(self, num_tokens: int) -> int:
        """Return how many blocks `num_tokens` tokens take."""
        return -(-num_tokens // self.block_size)

    def attach(self, table: list[int], chain: Chain, token_ids: Sequence[int]) -> int:
        """Put the known blocks at the start of `token_ids` into the empty `table`; return their tokens.

        At least one token is left to compute, for its logits.
        """
        assert not table
        chain.reset()
        if self.is_caching:
            with self._lock:
                limit = (len(token_ids) - 1) // self.block_size
                for node in self._cache.match(chain.scope, token_ids, self.block_size, limit):
                    self._cache.wake(node.block)
                    self._holders[node.block] = self._holders.get(node.block, 0) + 1
                    table.append(node.block)
                    chain.tip = node.number
            chain.length = len(table)
        return len(table) * self.block_size

    def count_known(self, chain: Chain, token_ids: Sequence[int]) -> int:
        """Return how many tokens `attach` would find."""
        if not self.is_caching:
            return 0
        limit = (len(token_ids) - 1) // self.block_size
        with self._lock:
            known = self._cache.match(chain.scope, token_ids, self.block_size, limit)
        return len(known) * self.block_size

    def can_grow(self, table: list[int], num_tokens: int) -> bool:
        """Whether `table` could be extended to hold `num_tokens` tokens, whatever idle has to go for it."""
        missing = self.blocks_for(num_tokens) - len(table)
        if missing <= 0:
            return True
        with self._lock:
            at_hand = self._pages.num_ready + self._cache.num_idle
        if missing <= at_hand:
            return True
        return missing <= at_hand + self._pages.blocks_within(self._budget.kv_could_have_bytes())

    def grow(self, table: list[int], num_tokens: int) -> bool:
        """Extend `table` to hold `num_tokens` tokens, or leave it as it is."""
        taken: list[int] = []
        for _ in range(self.blocks_for(num_tokens) - len(table)):
            block = self._take()
            if block is None:
                self.free(taken)
                return False
            taken.append(block)
        table += taken
        return True

    def register(self, table: list[int], chain: Chain, token_ids: Sequence[int], num_computed: int) -> None:
        """Make the full blocks of `table` known whose tokens have been computed since the last time."""
        if not self.is_caching or num_computed // self.block_size <= chain.length:
            return
        with self._lock:
            for index in range(chain.length, num_computed // self.block_size):
                start = index * self.block_size
                tokens = tuple(token_ids[start : start + self.block_size])
                chain.tip = self._cache.insert(chain.tip, tokens, table[index])
            chain.length = num_computed // self.block_size

    def free(self, table: list[int]) -> None:
        """Take back all blocks of `table` and empty it; known ones that nobody else holds become idle."""
        now = self._clock()
        with self._lock:
            # Backwards, so that the end of a prefix goes before its beginning, without which it is not found.
            for block in reversed(table):
                self._holders[block] -= 1
                if self._holders[block] == 0:
                    del self._holders[block]
                    if block in self._cache:
                        self._cache.rest(block, now)
                    else:
                        self._pages.put(block)
        table.clear()

    # What the other side of the budget asks.

    def idle_bytes(self) -> int:
        """Return the bytes of the extents without live blocks."""
        with self._lock:
            live = {self._pages.extent_of(block) for block in self._holders}
            return sum(map(self._pages.extent_bytes, self._pages.held - live))

    def idle_worth(self) -> float | None:
        """Return what the extent is worth that `free_idle` would free; nothing where it is empty."""
        with self._lock:
            if self._pages.empty_extent() is not None:
                return 0.0
            block = self._first_to_go()
            return None if block is None else self._worth(block)

    def free_idle(self) -> bool:
        """Forget the idle blocks of the extent that was used longest ago, and give its memory back."""
        with self._lock:
            extent = self._pages.empty_extent()
            if extent is None:
                block = self._first_to_go()
                if block is None:
                    return False
                extent = self._pages.extent_of(block)
                for idle in [idle for idle in self._cache.idle if self._pages.extent_of(idle) == extent]:
                    self._forget(idle)
            self._pages.release(extent)
            return True

    def _first_to_go(self) -> int | None:
        """Return the least recently used idle block whose extent has no live one."""
        live = {self._pages.extent_of(block) for block in self._holders}
        return next((block for block in self._cache.idle if self._pages.extent_of(block) not in live), None)

    def _take(self) -> int | None:
        """Take a free block; where there is none, free what is idle and cheapest, pages or adapters."""
        while True:
            with self._lock:
                block = self._pages.take()
                if block is not None:
                    self._holders[block] = 1
                    return block
                idle = next(iter(self._cache.idle), None)
                own_worth = None if idle is None else self._worth(idle)
            if self._adapters_go_first(own_worth):
                continue
            if idle is None:
                return None
            with self._lock:
                if self._cache.is_idle(idle):
                    self._forget(idle)

    def _adapters_go_first(self, own_worth: float | None) -> bool:
        """Free an idle adapter, where that would help and costs less than an idle block worth `own_worth`."""
        adapters = self._budget.adapters
        if adapters is None or self._pages.blocks_within(self._budget.kv_could_have_bytes()) == 0:
            return False
        worth = adapters.idle_worth()
        if worth is None or (own_worth is not None and own_worth <= worth):
            return False
        return adapters.free_idle()

    def _worth(self, block: int) -> float:
        """Seconds of computing that keeping one byte saves: as often as its age suggests, times its cost."""
        age_seconds = max(self._clock() - self._cache.idle[block], _SHORTEST_AGE_SECONDS)
        return self.block_size * self.seconds_per_token / (age_seconds * self._block_bytes)

    def _forget(self, block: int) -> None:
        self._cache.forget(block)
        self._pages.put(block)
