"""Places in the queue, of which one tenant cannot take all."""

from __future__ import annotations

from collections import Counter


class QueueShare:
    """At most `limit` requests alive, and of each tenant at most a multiple of the places left free.

    That multiple is chosen so that a tenant alone stops at `tenant_share` of all places. Several that press
    stop earlier, together still short of all, so whoever is new finds a place (dynamic thresholds; Choudhury
    and Hahne, 1998). Not thread-safe.
    """

    def __init__(self, limit: int, tenant_share: float = 1.0) -> None:
        assert 0 < tenant_share <= 1
        self._limit = limit
        self._tenant_share = tenant_share
        self._held: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Places taken."""
        return self._held.total()

    @property
    def num_tenants(self) -> int:
        """Tenants that hold a place, at least 1."""
        return max(len(self._held), 1)

    def held_by(self, tenant: str) -> int:
        """Return how many places `tenant` holds."""
        return self._held[tenant]

    def limit_of(self, tenant: str) -> int:
        """Return how many places `tenant` could hold beside the others; at least 1 where one is free."""
        others = self.held - self._held[tenant]
        free_for_it = self._limit - others
        # h <= m (limit - others - h) with m = share / (1 - share) is h <= share (limit - others).
        return max(int(self._tenant_share * free_for_it), min(1, free_for_it))

    def take(self, tenant: str) -> bool:
        """Take a place for `tenant`, if it may have one more."""
        if self._held[tenant] >= self.limit_of(tenant):
            return False
        self._held[tenant] += 1
        return True

    def give_back(self, tenant: str) -> None:
        """Give a place back."""
        left = self._held[tenant] - 1
        assert left >= 0, "a place is given back once"
        if left:
            self._held[tenant] = left
        else:
            del self._held[tenant]
