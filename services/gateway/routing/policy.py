"""What a routing policy is asked, and what it may look at."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Protocol

NONE_EXCLUDED: Set[str] = frozenset()


class FleetView(Protocol):
    """The replicas as a router knows them, named by their addresses; adapters are named by their digests."""

    @property
    def members(self) -> Sequence[str]:
        """The replicas that take new requests, in a fixed order; the same object until they change."""
        ...

    @property
    def outstanding(self) -> int:
        """Requests that run or wait on all members together."""
        ...

    def takes(self, replica: str) -> bool:
        """Whether the replica is one of the members."""
        ...

    def load(self, replica: str) -> int:
        """Return how many requests run or wait there."""
        ...

    def slots(self, replica: str) -> int:
        """Return how many requests run there at once; more than these wait."""
        ...

    def holders(self, adapter: str) -> Collection[str]:
        """Return the members that have told that the adapter is in their memory, in a fixed order."""
        ...


class Policy(Protocol):
    """Chooses replicas. It holds no connection and never waits, so that a simulation can run it too."""

    def choose(self, adapter: str, fleet: FleetView, excluded: Set[str] = NONE_EXCLUDED) -> str | None:
        """Return the replica for a request; None where every member is excluded.

        Args:
            adapter: digest of the adapter's version; empty for the base and for what needs no model.
            fleet: who is there, how busy, and what they hold.
            excluded: replicas that must not be chosen.
        """
        ...
