"""The device tier: which adapters are there, which of them stay, and who makes room."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping

from services.common.errors import ResourceExhausted
from services.inference.adapters.entry import AdapterEntry
from services.inference.adapters.eviction import Candidate, Worth
from services.inference.adapters.measures import CacheMeasures
from services.inference.adapters.slots import DeviceSlots, Slot

# From page-locked memory over PCIe, about 10 GB/s.
_COPY_SECONDS_PER_BYTE = 1e-10


class DeviceTier:
    """Puts adapters in the device's slots; the adapters' side of the device's budget (see `Holder` there).

    Sequences pin what they run on. What an operator has kept stays without a pin; it may take at most
    `kept_budget_bytes`, and as long as it is not there yet, room is left for it. All under the cache's lock.
    """

    def __init__(
        self,
        slots: DeviceSlots,
        entries: Mapping[str, AdapterEntry],
        lock: threading.RLock,
        measures: CacheMeasures,
        *,
        kept_budget_bytes: int,
        demand_half_life_seconds: float,
        clock: Callable[[], float],
        worth: Worth,
    ) -> None:
        """Serve the cache that `entries` and `lock` belong to."""
        self.kept_used_bytes = 0
        self._slots = slots
        self._entries = entries
        self._lock = lock
        self._measures = measures
        self._kept_budget_bytes = kept_budget_bytes
        self._half_life_seconds = demand_half_life_seconds
        self._clock = clock
        self._worth = worth
        slots.budget.adapters = self

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    @property
    def used_bytes(self) -> int:
        """Bytes of the adapters on the device."""
        return self._slots.used_bytes

    @property
    def room_bytes(self) -> int:
        """The most bytes that an adapter which is not kept can have."""
        return self._slots.budget_bytes - self.kept_used_bytes

    def pins(self, digest: str) -> int:
        """Return how many sequences run on an adapter."""
        return self._slots[digest].pins if digest in self._slots else 0

    def pin(self, entry: AdapterEntry) -> Slot | None:
        """Put an adapter on the device for a sequence; None where there is no room now."""
        if not self._place(entry):
            return None
        slot = self._slots[entry.digest]
        slot.pins += 1
        return slot

    def unpin(self, entry: AdapterEntry) -> None:
        """Take a sequence's pin back."""
        slot = self._slots[entry.digest]
        slot.pins -= 1
        assert slot.pins >= 0
        if self._unplaced_bytes():
            self._place_kept()

    def evict(self, entry: AdapterEntry) -> None:
        """Take an adapter off the device, if it is there."""
        if entry.digest in self._slots:
            self._slots.evict(entry.digest)

    def keep(self, entry: AdapterEntry) -> None:
        """Keep an adapter there from now on; it is put there as soon as there is room, before all others.

        Raises:
            ResourceExhausted: `pin_budget_exceeded`, also where a request could then never have its adapter.
        """
        wanted_bytes = self.kept_used_bytes + entry.size_bytes
        limit_bytes = min(self._kept_budget_bytes, self._slots.budget_bytes - self._largest_other(entry))
        if wanted_bytes > limit_bytes:
            raise ResourceExhausted(
                "pin_budget_exceeded",
                f"The adapter takes {entry.size_bytes} bytes; pinned adapters would take {wanted_bytes} "
                f"of the device, and at most {limit_bytes} are given to them.",
                field="adapter",
                value=wanted_bytes,
                limit=limit_bytes,
                final=True,
            )
        entry.kept = True
        self.kept_used_bytes = wanted_bytes
        self._place_kept()

    def let_go(self, entry: AdapterEntry) -> None:
        """End what `keep` began."""
        entry.kept = False
        self.kept_used_bytes -= entry.size_bytes

    def idle_bytes(self) -> int:
        """Return the bytes that no sequence and no operator holds."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._idle())

    def idle_worth(self) -> float | None:
        """Return the seconds per byte that the cheapest idle adapter saves, about."""
        now = self._clock()
        with self._lock:
            demand = min((entry.demand.at(now) for entry in self._idle()), default=None)
        if demand is None:
            return None
        # A count that halves every h seconds stands for count x ln 2 / h requests in a second.
        return demand * math.log(2) / self._half_life_seconds * _COPY_SECONDS_PER_BYTE

    def free_idle(self) -> bool:
        """Evict the cheapest idle adapter; the host keeps it."""
        now = self._clock()
        with self._lock:
            candidates = [_candidate(entry, now) for entry in self._idle()]
            if not candidates:
                return False
            self._slots.evict(min(candidates, key=self._worth).digest)
            self._measures.evicted("device")
            return True

    def _idle(self) -> list[AdapterEntry]:
        unpinned = (self._entries[digest] for digest in self._slots.unpinned())
        return [entry for entry in unpinned if not entry.kept]

    def _place(self, entry: AdapterEntry) -> bool:
        if entry.digest in self._slots:
            return True
        assert entry.weights is not None
        ahead_bytes = 0 if entry.kept else self._unplaced_bytes()
        if not self._slots.budget.make_room_for_adapters(entry.size_bytes + ahead_bytes):
            return False
        return self._slots.put(entry.digest, entry.weights, entry.size_bytes)

    def _place_kept(self) -> None:
        for entry in self._entries.values():
            if entry.kept and not self._place(entry):
                return

    def _unplaced_bytes(self) -> int:
        """Bytes of kept adapters that are not there yet."""
        if not self.kept_used_bytes:
            return 0
        return sum(
            entry.size_bytes
            for entry in self._entries.values()
            if entry.kept and entry.digest not in self._slots
        )

    def _largest_other(self, entry: AdapterEntry) -> int:
        """Bytes of the largest adapter besides `entry` that requests hold and that is not kept."""
        others = (
            other.size_bytes
            for other in self._entries.values()
            if other is not entry and other.leases and not other.kept
        )
        return max(others, default=0)


def _candidate(entry: AdapterEntry, now: float) -> Candidate:
    """A copy back from the host costs time in proportion to bytes."""
    return Candidate(
        entry.digest, entry.size_bytes, entry.demand.at(now), entry.size_bytes, entry.last_use_at
    )
