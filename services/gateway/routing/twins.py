"""The plain policies, with which the one in use is compared."""

from __future__ import annotations

import random
from collections.abc import Set

from services.gateway.routing.policy import NONE_EXCLUDED, FleetView
from services.gateway.routing.ring import Rings


class RandomChoice:
    """Any replica, each as likely."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311 - no secret

    def choose(self, adapter: str, fleet: FleetView, excluded: Set[str] = NONE_EXCLUDED) -> str | None:
        """Return a replica by chance."""
        members = fleet.members
        if excluded:
            members = [replica for replica in members if replica not in excluded]
        return self._random.choice(members) if members else None


class RoundRobin:
    """One replica after the other."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, adapter: str, fleet: FleetView, excluded: Set[str] = NONE_EXCLUDED) -> str | None:
        """Return the replica whose turn it is."""
        for _ in fleet.members:
            replica = fleet.members[self._next % len(fleet.members)]
            self._next += 1
            if replica not in excluded:
                return replica
        return None


class ConsistentHashing:
    """The adapter's home on the ring, however busy it is (Karger et al. 1997)."""

    def __init__(self) -> None:
        self._rings = Rings()

    def choose(self, adapter: str, fleet: FleetView, excluded: Set[str] = NONE_EXCLUDED) -> str | None:
        """Return the first replica clockwise from the adapter."""
        ring = self._rings.of(fleet.members)
        return next((replica for replica in ring.walk(adapter) if replica not in excluded), None)
