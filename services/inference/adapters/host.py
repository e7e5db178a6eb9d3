"""The host tier: how many bytes of adapters are in memory, and who makes room there."""

from __future__ import annotations

from collections.abc import Iterable

from services.inference.adapters.disk import DiskTier
from services.inference.adapters.entry import AdapterEntry
from services.inference.adapters.eviction import Candidate, Worth, choose_victims
from services.inference.adapters.measures import count_bytes


class HostTier:
    """The bytes of one budget, taken when a load begins to read. Guarded by the lock of its cache."""

    def __init__(self, budget_bytes: int, disk: DiskTier, worth: Worth) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._disk = disk
        self._worth = worth

    def take(self, entry: AdapterEntry, size_bytes: int) -> None:
        """Give bytes to `entry`; the caller has made room."""
        assert self.used_bytes + size_bytes <= self.budget_bytes
        entry.reserved_bytes = size_bytes
        self.used_bytes += size_bytes
        count_bytes("host", size_bytes)

    def give_back(self, entry: AdapterEntry) -> None:
        """Take back all that `entry` has."""
        self.used_bytes -= entry.reserved_bytes
        count_bytes("host", -entry.reserved_bytes)
        entry.reserved_bytes = 0

    def victims(
        self, entries: Iterable[AdapterEntry], size_bytes: int, now_seconds: float
    ) -> list[str] | None:
        """Return the idle adapters among `entries` that must go so that `size_bytes` fit; None where all of
        them would not do.
        """
        needed_bytes = self.used_bytes + size_bytes - self.budget_bytes
        if needed_bytes <= 0:
            return []
        idle = [self._candidate(entry, now_seconds) for entry in entries if entry.is_idle]
        return choose_victims(idle, needed_bytes, self._worth)

    def _candidate(self, entry: AdapterEntry, now_seconds: float) -> Candidate:
        """What it costs to have it back depends on whether the disk still has it."""
        seconds = entry.times.reload_seconds(from_disk=entry.digest in self._disk)
        demand = entry.demand.at(now_seconds)
        return Candidate(entry.digest, entry.size_bytes, demand, seconds, entry.last_use_at)
