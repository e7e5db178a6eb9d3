"""The adapter cache: registry to disk to host to device, with byte budgets and leases.

A request takes a lease when it arrives and keeps it to its end; the lease starts the load. A sequence takes a
pin when it is admitted to the batch. An operator may have an adapter kept on the device. The host tier never
evicts what is leased, kept or pinned, the device tier never what is kept or pinned.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.common.errors import LorafleetError, ResourceExhausted
from services.inference.adapters.demand import DemandHistory
from services.inference.adapters.disk import DiskTier, Fetcher, folder_name
from services.inference.adapters.entry import AdapterEntry, AdapterResidency, AdapterState
from services.inference.adapters.eviction import Candidate, Worth, choose_victims, reload_cost_per_byte
from services.inference.adapters.lease import Lease
from services.inference.adapters.loader import AdapterLoader
from services.inference.adapters.measures import CacheMeasures, CacheStats
from services.inference.adapters.reader import adapter_size_bytes, read_adapter
from services.inference.adapters.slots import DeviceSlots
from services.inference.adapters.targets import LoraTargets
from services.inference.adapters.weights import AdapterWeights

# From page-locked memory over PCIe, about 10 GB/s.
_COPY_SECONDS_PER_BYTE = 1e-10


@dataclass(frozen=True, slots=True)
class CacheBudget:
    """The knobs of the cache.

    Attributes:
        host_bytes: of the host tier.
        kept_bytes: most of the device that kept adapters may take, so that the others can still be served.
        loader_threads: adapters read at once.
        download_threads: adapters downloaded at once.
        failure_seconds: how long a failed load is remembered.
        demand_half_life_seconds: how fast demand is forgotten.
    """

    host_bytes: int
    kept_bytes: int = 0
    loader_threads: int = 4
    download_threads: int = 16
    failure_seconds: float = 10.0
    demand_half_life_seconds: float = 300.0


class AdapterCache:
    """Adapters by version digest. Thread-safe; `acquire` and `Lease` never wait for I/O.

    `on_change` is called on a loader thread after each load has ended, well or badly; its owner sets it.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        disk: DiskTier,
        slots: DeviceSlots,
        targets: LoraTargets,
        dtype: torch.dtype,
        budget: CacheBudget,
        *,
        clock: Callable[[], float] = time.monotonic,
        worth: Worth = reload_cost_per_byte,
    ) -> None:
        self._disk = disk
        self._slots = slots
        self._budget = budget
        self._clock = clock
        self._worth = worth
        self._lock = threading.RLock()
        self._entries: dict[str, AdapterEntry] = {}
        self._waiting_for_host: list[AdapterEntry] = []
        self._history = DemandHistory(budget.demand_half_life_seconds)
        self._host_used_bytes = 0
        self._kept_used_bytes = 0
        self._measures = CacheMeasures()
        self._closed = False
        self._loader = AdapterLoader(
            fetcher,
            disk,
            _Reader(targets, dtype),
            self,
            reader_threads=budget.loader_threads,
            download_threads=budget.download_threads,
            is_copied=not slots.shares_host_memory,
        )
        slots.budget.adapters = self
        self.on_change: Callable[[], None] = _do_nothing

    def acquire(self, digest: str) -> Lease:
        """Take a lease on the version `digest` and start its load if it is not on the host.

        Raises:
            InvalidArgument: `bad_digest`.
            LorafleetError: the error of a load that failed less than `failure_seconds` ago.
        """
        folder_name(digest)
        now = self._clock()
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None and entry.error is not None:
                if now < entry.failed_until:
                    raise entry.error
                entry = None
            is_new = entry is None
            if entry is None:
                entry = AdapterEntry(digest, self._history.of(digest), asked_at=now)
                self._entries[digest] = entry
            entry.leases += 1
            entry.last_use_at = now
            entry.demand.add(now)
            self._measures.asked(digest, is_hit=entry.weights is not None)
            if is_new:
                self._start_load(entry)
            return Lease(self, entry)

    def residency(self) -> list[AdapterResidency]:
        """List every adapter that is loading, loaded or recently failed."""
        with self._lock:
            return [self._resident(entry) for entry in self._entries.values()]

    def find(self, digest: str) -> AdapterResidency | None:
        """Return one adapter, as `residency` lists it."""
        with self._lock:
            entry = self._entries.get(digest)
            return None if entry is None else self._resident(entry)

    def is_on_device(self, digest: str) -> bool:
        """Whether an adapter is on the device."""
        return digest in self._slots

    def tiers(self) -> dict[str, AdapterState]:
        """Return where each adapter is, by digest; cheaper than `residency`."""
        with self._lock:
            return {
                digest: AdapterState.DEVICE if digest in self._slots else entry.state
                for digest, entry in self._entries.items()
            }

    def held(self) -> set[str]:
        """Return the digests that are leased or kept."""
        with self._lock:
            return {digest for digest, entry in self._entries.items() if entry.leases or entry.kept}

    def on_disk(self) -> dict[str, int]:
        """Return the bytes on disk of every adapter there, by digest."""
        return self._disk.sizes()

    def origins(self) -> list[str]:
        """Return what the fetcher said of every adapter on disk, where it said anything."""
        return self._disk.origins()

    def evict(self, digest: str) -> bool:
        """Drop an adapter from every tier, and a failure from memory; may wait for the disk.

        False where it is leased, kept, being loaded or not there.
        """
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                if entry.leases or entry.kept or entry.state is AdapterState.FETCHING:
                    return False
                self._drop(entry)
                self._retry_waiting()
        return self._disk.discard(digest) or entry is not None

    def keep(self, digest: str) -> bool:
        """Hold a leased and loaded adapter on the device until `let_go`; it is put there as soon as there is
        room, before all others. False where it was kept already.

        Raises:
            ResourceExhausted: `pin_budget_exceeded`.
        """
        with self._lock:
            entry = self._entries[digest]
            assert entry.leases > 0
            assert entry.weights is not None
            if entry.kept:
                return False
            wanted_bytes = self._kept_used_bytes + entry.size_bytes
            limit_bytes = min(self._budget.kept_bytes, self._slots.budget_bytes - self._largest_other(entry))
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
            self._kept_used_bytes = wanted_bytes
            self._place_kept()
            return True

    def let_go(self, digest: str) -> bool:
        """End what `keep` began; False where the adapter was not kept."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is None or not entry.kept:
                return False
            entry.kept = False
            self._kept_used_bytes -= entry.size_bytes
            self._retry_waiting()
            return True

    def stats(self) -> CacheStats:
        """Return a copy of the counters and gauges."""
        with self._lock:
            return replace(
                self._measures.stats,
                host_used_bytes=self._host_used_bytes,
                device_used_bytes=self._slots.used_bytes,
                disk_used_bytes=self._disk.used_bytes,
            )

    def close(self) -> None:
        """Stop the loader threads; loads not yet started are dropped."""
        with self._lock:
            self._closed = True
        self._loader.close()

    # What the loader calls, on its threads.

    def reserve(self, entry: AdapterEntry, size_bytes: int) -> bool:
        """Take host bytes for `entry`, or queue it for when others have been given back."""
        with self._lock:
            limit = min(self._budget.host_bytes, self._slots.budget_bytes) - self._kept_used_bytes
            if size_bytes > limit:
                raise ResourceExhausted(
                    "adapter_too_large",
                    f"The adapter takes {size_bytes} bytes of memory; at most {limit} are possible here.",
                    value=size_bytes,
                    limit=limit,
                )
            entry.size_bytes = size_bytes
            if not self._make_host_room(size_bytes):
                self._waiting_for_host.append(entry)
                return False
            entry.reserved_bytes = size_bytes
            self._host_used_bytes += size_bytes
            return True

    def loaded(self, entry: AdapterEntry, weights: AdapterWeights) -> None:
        """Take the weights over."""
        with self._lock:
            entry.weights = weights
            entry.state = AdapterState.HOST
            self._measures.loaded(entry.times, self._clock() - entry.asked_at)
            # All its leases may have gone while it was loading, and others may wait for its bytes.
            self._retry_waiting()
        self.on_change()

    def failed(self, entry: AdapterEntry, error: LorafleetError) -> None:
        """Note that a load failed, for whoever holds it and for those who ask in the next seconds."""
        with self._lock:
            entry.error = error
            entry.state = AdapterState.FAILED
            entry.failed_until = self._clock() + self._budget.failure_seconds
            self._give_back_host(entry)
            self._forget_old_failures()
            self._measures.failed(error.reason)
            self._retry_waiting()
        self.on_change()

    def _start_load(self, entry: AdapterEntry) -> None:
        if not self._closed:
            self._loader.start(entry)

    def _forget_old_failures(self) -> None:
        now = self._clock()
        for entry in list(self._entries.values()):
            if entry.error is not None and entry.failed_until <= now:
                del self._entries[entry.digest]

    # What leases call.

    def release(self, entry: AdapterEntry) -> None:
        """Take a lease back."""
        with self._lock:
            entry.leases -= 1
            assert entry.leases >= 0
            if entry.leases == 0 and self._waiting_for_host:
                self._retry_waiting()

    def pin(self, entry: AdapterEntry) -> AdapterWeights | None:
        """Put a leased adapter on the device for a sequence; None where the device has no room now."""
        with self._lock:
            assert entry.weights is not None
            assert entry.leases > 0
            if not self._place(entry):
                return None
            slot = self._slots[entry.digest]
            slot.pins += 1
            return slot.weights

    def unpin(self, entry: AdapterEntry) -> None:
        """Take a sequence's pin back."""
        with self._lock:
            slot = self._slots[entry.digest]
            slot.pins -= 1
            assert slot.pins >= 0
            if self._unplaced_bytes():
                self._place_kept()

    # Room on the device, under the lock.

    def _place(self, entry: AdapterEntry) -> bool:
        if entry.digest in self._slots:
            return True
        assert entry.weights is not None
        # What is kept and not there yet goes first.
        ahead_bytes = 0 if entry.kept else self._unplaced_bytes()
        if not self._slots.budget.make_room_for_adapters(entry.size_bytes + ahead_bytes):
            return False
        return self._slots.put(entry.digest, entry.weights, entry.size_bytes)

    def _place_kept(self) -> None:
        for entry in self._entries.values():
            if entry.kept and not self._place(entry):
                return

    def _unplaced_bytes(self) -> int:
        """Bytes of kept adapters that are not on the device yet."""
        if not self._kept_used_bytes:
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

    # What the device's budget asks, for the KV cache's sake: see `device_budget.Holder`.

    def idle_bytes(self) -> int:
        """Return the bytes on the device that no sequence and no operator holds."""
        with self._lock:
            return sum(entry.size_bytes for entry in self._idle_on_device())

    def idle_worth(self) -> float | None:
        """Return the seconds per byte that the cheapest idle adapter saves, about."""
        now = self._clock()
        with self._lock:
            demand = min((entry.demand.at(now) for entry in self._idle_on_device()), default=None)
        if demand is None:
            return None
        # A count that halves every h seconds stands for count x ln 2 / h requests in a second.
        return demand * math.log(2) / self._budget.demand_half_life_seconds * _COPY_SECONDS_PER_BYTE

    def free_idle(self) -> bool:
        """Evict the cheapest idle adapter from the device; the host keeps it."""
        now = self._clock()
        with self._lock:
            candidates = [self._candidate(entry, entry.size_bytes, now) for entry in self._idle_on_device()]
            if not candidates:
                return False
            self._slots.evict(min(candidates, key=self._worth).digest)
            self._measures.evicted("device")
            return True

    def _idle_on_device(self) -> list[AdapterEntry]:
        idle = (self._entries[digest] for digest in self._slots.unpinned())
        return [entry for entry in idle if not entry.kept]

    # Room on the host, under the lock.

    def _make_host_room(self, size_bytes: int) -> bool:
        needed_bytes = self._host_used_bytes + size_bytes - self._budget.host_bytes
        if needed_bytes <= 0:
            return True
        now = self._clock()
        idle = [entry for entry in self._entries.values() if entry.is_idle]
        victims = choose_victims(
            (
                self._candidate(entry, entry.times.reload_seconds(from_disk=entry.digest in self._disk), now)
                for entry in idle
            ),
            needed_bytes,
            self._worth,
        )
        for digest in victims or ():
            self._drop(self._entries[digest])
            self._measures.evicted("host")
        return victims is not None

    def _candidate(self, entry: AdapterEntry, reload_cost: float, now: float) -> Candidate:
        return Candidate(entry.digest, entry.size_bytes, entry.demand.at(now), reload_cost, entry.last_use_at)

    def _drop(self, entry: AdapterEntry) -> None:
        assert entry.leases == 0
        assert not entry.kept
        if entry.digest in self._slots:
            self._slots.evict(entry.digest)
        entry.weights = None
        self._give_back_host(entry)
        del self._entries[entry.digest]

    def _give_back_host(self, entry: AdapterEntry) -> None:
        self._host_used_bytes -= entry.reserved_bytes
        entry.reserved_bytes = 0

    def _retry_waiting(self) -> None:
        waiting, self._waiting_for_host = self._waiting_for_host, []
        for entry in waiting:
            if entry.leases:
                self._start_load(entry)
            elif self._entries.get(entry.digest) is entry:
                del self._entries[entry.digest]

    def _resident(self, entry: AdapterEntry) -> AdapterResidency:
        on_device = entry.digest in self._slots
        return AdapterResidency(
            entry.digest,
            AdapterState.DEVICE if on_device else entry.state,
            entry.size_bytes,
            entry.leases,
            self._slots[entry.digest].pins if on_device else 0,
            entry.kept,
            entry.times.total_seconds,
            entry.last_use_at,
            entry.error,
            entry.failed_until,
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads folders for one base."""

    targets: LoraTargets
    dtype: torch.dtype

    def size_bytes(self, folder: Path) -> int:
        return adapter_size_bytes(folder, self.targets, self.dtype)

    def read(self, folder: Path) -> AdapterWeights:
        return read_adapter(folder, self.targets, self.dtype)


def _do_nothing() -> None:
    pass
