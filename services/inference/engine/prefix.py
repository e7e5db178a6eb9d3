"""The prefix cache: which blocks hold the keys and values of which tokens, after which other tokens.

A full block is a node of a tree. Its key is the node before it and its own tokens, compared in full, so two
different prefixes can never be taken for one another. The root of a tree is the tenant and the version's
digest: nothing is found across tenants, adapters or versions. Node numbers never repeat, so what hangs from a
node that was forgotten is never found again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Scope = tuple[str, str | None]
Parent = int | Scope


@dataclass(slots=True)
class Chain:
    """How far one sequence's block table is known to the cache: `length` blocks, the last at `tip`."""

    scope: Scope
    tip: Parent
    length: int = 0

    @classmethod
    def at_root(cls, scope: Scope) -> Chain:
        """Return the chain of a table that holds nothing known."""
        return cls(scope, scope)

    def reset(self) -> None:
        """Go back to the root."""
        self.tip, self.length = self.scope, 0


@dataclass(frozen=True, slots=True)
class Node:
    """A block whose contents are known."""

    number: int
    block: int
    key: tuple[Parent, tuple[int, ...]]


class PrefixCache:
    """Finds blocks by their tokens, and knows which of them nobody uses, least recently used first."""

    def __init__(self) -> None:
        self._nodes: dict[tuple[Parent, tuple[int, ...]], Node] = {}
        self._by_block: dict[int, Node] = {}
        self._idle_since: OrderedDict[int, float] = OrderedDict()
        self._next_number = 0

    def __contains__(self, block: int) -> bool:
        return block in self._by_block

    @property
    def num_idle(self) -> int:
        """Known blocks that no sequence uses."""
        return len(self._idle_since)

    @property
    def idle(self) -> OrderedDict[int, float]:
        """Those blocks and since when, the one that goes first at the front."""
        return self._idle_since

    def is_idle(self, block: int) -> bool:
        """Whether `block` is known and no sequence uses it."""
        return block in self._idle_since

    def match(self, scope: Scope, token_ids: Sequence[int], block_size: int, limit: int) -> list[Node]:
        """Return the longest known run of full blocks at the start of `token_ids`, at most `limit` blocks."""
        nodes: list[Node] = []
        parent: Parent = scope
        for start in range(0, limit * block_size, block_size):
            node = self._nodes.get((parent, tuple(token_ids[start : start + block_size])))
            if node is None:
                break
            nodes.append(node)
            parent = node.number
        return nodes

    def insert(self, parent: Parent, token_ids: tuple[int, ...], block: int) -> int:
        """Make `block` known, unless another holds the same already; return the number of the node."""
        key = (parent, token_ids)
        node = self._nodes.get(key)
        if node is None:
            self._next_number += 1
            node = Node(self._next_number, block, key)
            self._nodes[key] = self._by_block[block] = node
        return node.number

    def rest(self, block: int, now: float) -> None:
        """Note that nobody uses a known block any more."""
        self._idle_since[block] = now

    def wake(self, block: int) -> None:
        """Note that a known block is used again."""
        self._idle_since.pop(block, None)

    def forget(self, block: int) -> None:
        """Make an idle block unknown, so that it can be overwritten."""
        del self._idle_since[block]
        del self._nodes[self._by_block.pop(block).key]
